//! Programs of Core ML, as they are being built: types, shapes, and what each operation makes of them.
//!
//! [`infer()`] knows the operations that a decoder needs, those of iOS 18 (opset `CoreML8`): which parameters they
//! have, and the types of their results. It follows coremltools 9 (`converters/mil/mil/ops/defs`), so that types
//! which it gives are those that coremltools infers when it loads a program. No values of weights are seen here.
//!
//! [`Builder`] puts operations together to a function, [`decoder()`] the function of a language model, and [`Text`]
//! shows one as text.

mod builder;
pub mod decoder;
mod infer;
mod math;
mod state;
mod text;
mod types;
mod value;
mod weight;

pub use builder::{Arg, Builder, Built, Feature, OPSET, Value, identifier};
pub use decoder::{LEAST_EPS, Layout, Part, Target, decoder};
pub use infer::{Call, OPERATIONS, Operation, Parameter, infer};
pub use state::State;
pub use text::Text;
pub use types::{Dim, Symbol, Symbols, TensorType, broadcast};
pub use value::{Int, Known, Operand};
pub use weight::{Encoded, Form, Place, Stored, Weights};
