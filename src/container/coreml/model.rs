//! What is around a program: the messages of `Model.proto` and `FeatureTypes.proto` (coremltools,
//! `mlmodel/format`), as far as language models need them. Numbers are those of these files.

use std::collections::BTreeMap;

use super::message::{Only, message, oneof, varint_slot};
use super::mil::Program;
use super::wire::Varint;
use crate::error::{Error, Result};

message! {
    /// The file `model.mlmodel`.
    Model {
        /// 8 for iOS 17, 9 for iOS 18, 10 for iOS 26.
        1 specification_version: i32,
        /// Inputs and outputs.
        2 description: ModelDescription,
        /// Whether it can be trained on the device.
        10 is_updatable: bool,
        /// What it computes. Models of other kinds have none.
        502 program: Program,
    }

    /// What goes in and comes out. A model of several functions says it of each, and has nothing in `input`, `output`
    /// and `state`.
    ModelDescription {
        /// Inputs.
        1 input: Vec<FeatureDescription>,
        /// Outputs, in the order of the block's.
        10 output: Vec<FeatureDescription>,
        /// States.
        13 state: Vec<FeatureDescription>,
        /// The functions of a model of several.
        20 functions: Vec<FunctionDescription>,
        /// The one that counts where none is asked for.
        21 default_function_name: String,
        /// Who made it, from what.
        100 metadata: Metadata,
    }

    /// What goes into a function and comes out.
    FunctionDescription {
        /// Its name in the program.
        1 name: String,
        /// Inputs.
        2 input: Vec<FeatureDescription>,
        /// Outputs, in the order of the block's.
        3 output: Vec<FeatureDescription>,
        /// States.
        6 state: Vec<FeatureDescription>,
    }

    /// An input, an output or a state.
    FeatureDescription {
        /// Its name in the program.
        1 name: String,
        /// For people.
        2 short_description: String,
        /// Its type.
        3 feature_type: FeatureType,
    }

    /// Who made it, from what.
    Metadata {
        /// For people.
        1 short_description: String,
        /// For people.
        2 version_string: String,
        /// For people.
        3 author: String,
        /// For people.
        4 license: String,
        /// Anything else: `co.huggingface.exporters.name` is where swift-transformers looks for the tokenizer.
        100 user_defined: BTreeMap<String, String>,
    }

    /// A type of inputs, outputs and states.
    FeatureType {
        /// Whether an input may be left out.
        1000 is_optional: bool,
    } + /// Which one.
    kind: FeatureKind;

    /// A type of arrays.
    ArrayFeatureType {
        /// The shape, or the one that counts where none is given; empty for outputs whose shape is not known.
        1 shape: Vec<i64>,
        /// Type of the elements.
        2 data_type: ArrayDataType,
    } + /// Other shapes that it may have.
    flexibility: Flexibility;

    /// The sizes that a dimension may have.
    SizeRange {
        /// From here on.
        1 lower_bound: u64,
        /// To here, this one too; -1 where there is no bound.
        2 upper_bound: i64,
    }
}

oneof! {
    /// The types that language models need.
    FeatureKind {
        /// Arrays.
        5 MultiArray(ArrayFeatureType),
        /// States, by the type of what they hold.
        8 State(Only<ArrayFeatureType>),
    }

    /// Shapes of an input.
    Flexibility {
        /// One of these; the one that counts where none is given among them.
        21 Enumerated(Only<Vec<Only<Vec<i64>>>>),
        /// A range for each dimension.
        31 Range(Only<Vec<SizeRange>>),
    }
}

/// Type of the elements of an input, output or state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArrayDataType {
    /// None is said.
    #[default]
    Invalid,
    /// 16 bits.
    Float16,
    /// 32 bits.
    Float32,
    /// 64 bits.
    Double,
    /// Signed, 8 bits; from specification 10 on.
    Int8,
    /// Signed, 32 bits.
    Int32,
}

impl ArrayDataType {
    /// Each with its number: the bits of an element, and 2^16, 2^17 for a sign.
    const ALL: [(Self, u64); 6] = [
        (Self::Invalid, 0),
        (Self::Float16, 65552),
        (Self::Float32, 65568),
        (Self::Double, 65600),
        (Self::Int8, 131_080),
        (Self::Int32, 131_104),
    ];
}

impl Varint for ArrayDataType {
    fn to_varint(self) -> u64 {
        Self::ALL.iter().find(|(t, _)| *t == self).map_or(0, |(_, number)| *number)
    }

    fn from_varint(value: u64) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, number)| *number == value);
        known
            .map(|(t, _)| *t)
            .ok_or_else(|| Error::unsupported(format!("array data type {value} is not known")))
    }
}

varint_slot! { ArrayDataType }

impl FeatureDescription {
    /// An input or an output. The shape is the only one where `flexibility` says nothing.
    pub fn array(
        name: impl Into<String>,
        data_type: ArrayDataType,
        shape: &[i64],
        flexibility: Flexibility,
    ) -> Self {
        let array = ArrayFeatureType { shape: shape.to_vec(), data_type, flexibility };
        Self::of(name, FeatureKind::MultiArray(array))
    }

    /// A state, whose elements have 16 bits.
    pub fn state(name: impl Into<String>, shape: &[i64]) -> Self {
        let data_type = ArrayDataType::Float16;
        let array = ArrayFeatureType { shape: shape.to_vec(), data_type, ..ArrayFeatureType::default() };
        Self::of(name, FeatureKind::State(Only(array)))
    }

    fn of(name: impl Into<String>, kind: FeatureKind) -> Self {
        let feature_type = FeatureType { kind, ..FeatureType::default() };
        Self { name: name.into(), feature_type, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{decode, encode};
    use super::*;

    #[test]
    fn known_bytes() {
        let sizes =
            [(1, 1), (1, 16)].map(|(lower_bound, upper_bound)| SizeRange { lower_bound, upper_bound });
        let range = Flexibility::Range(Only(sizes.to_vec()));
        let ids = FeatureDescription::array("ids", ArrayDataType::Int32, &[1, 1], range);
        let array = [
            &[0x0a, 2, 1, 1, 0x10, 0xa0, 0x80, 0x08][..],
            &[0xfa, 0x01, 12, 0x0a, 4, 0x08, 1, 0x10, 1, 0x0a, 4, 0x08, 1, 0x10, 16],
        ]
        .concat();
        let wanted = [&[0x0a, 3, b'i', b'd', b's', 0x1a, 25, 0x2a, 23][..], &array].concat();
        assert_eq!(encode(&ids), wanted);
        let model = Model { program: Program { version: 1, ..Program::default() }, ..Model::default() };
        assert_eq!(encode(&model), [0xb2, 0x1f, 2, 0x08, 1]);
    }

    #[test]
    fn every_part_comes_back() {
        let shapes = Flexibility::Enumerated(Only(vec![Only(vec![1, 64]), Only(vec![1, 1])]));
        let mut optional = FeatureDescription::array("x", ArrayDataType::Float32, &[1, 64], shapes);
        optional.feature_type.is_optional = true;
        optional.short_description = "of some use".into();
        let state = FeatureDescription::state("keyCache", &[2, 1, 4, 64, 16]);
        let function = FunctionDescription {
            name: "prefill".into(),
            input: vec![optional.clone()],
            output: vec![FeatureDescription::array("y", ArrayDataType::Float16, &[], Flexibility::None)],
            state: vec![state.clone()],
        };
        let description = ModelDescription {
            input: vec![optional],
            output: Vec::new(),
            state: vec![state],
            functions: vec![function.clone(), function],
            default_function_name: "prefill".into(),
            metadata: Metadata {
                short_description: "s".into(),
                version_string: "1".into(),
                author: "a".into(),
                license: "l".into(),
                user_defined: [("b", "2"), ("a", "1")].map(|(k, v)| (k.into(), v.into())).into(),
            },
        };
        let model =
            Model { specification_version: 9, description, is_updatable: true, program: Program::default() };
        let (back, unknown) = decode::<Model>(&encode(&model)).unwrap();
        assert_eq!(back, model);
        assert!(unknown.is_empty());
    }

    #[test]
    fn types_have_their_numbers() {
        for (t, number) in ArrayDataType::ALL {
            assert_eq!((t.to_varint(), ArrayDataType::from_varint(number).unwrap()), (number, t));
        }
        let e = ArrayDataType::from_varint(131_088).unwrap_err();
        assert_eq!(e.to_string(), "array data type 131088 is not known");
    }
}
