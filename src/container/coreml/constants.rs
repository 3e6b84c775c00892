//! Constants of a function: those of `const`, and those that `constexpr` operations decode from others.
//!
//! Here is how each is made up, with shapes and types that fit together; the elements are decoded by
//! `packed::coreml`. Forms are those of iOS 18 (coremltools, `converters/mil/mil/ops/defs/iOS18/compression.py`),
//! whose parameters are inputs; of the earlier ones, whose parameters are attributes, only the name is known.

use std::collections::HashMap;
use std::sync::Arc;

use super::blob::Blob;
use super::mil::{
    Binding, Function, ImmediateValue, Operation, Stored, TensorType, TensorValue, Value, ValueType,
};
use super::{DataType, Package};
use crate::error::{Error, Result};

/// Most operations that stand behind one another between stored elements and a weight.
const DEPTH: usize = 4;
/// Most elements of an entry of a table: no weight has more than 512 for each byte that is stored for it. coremltools
/// makes few of a table of vectors, 2 to 8.
const MOST_WIDE: u64 = 64;

/// A constant.
#[derive(Debug, PartialEq)]
pub struct Constant {
    /// What the program calls it; parameters that stand in their operation are called `NAME/PARAMETER`.
    pub name: String,
    /// Type of its elements.
    pub data_type: DataType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// How it is made up.
    pub form: Form,
}

/// How a constant is made up. Parameters have the rank of the constant, those that are shared by blocks of elements
/// a size for each dimension that divides that of the constant; a table has two dimensions more, entries and
/// elements of an entry.
#[derive(Debug, PartialEq)]
pub enum Form {
    /// Of elements as they are stored.
    Plain(Place),
    /// `constexpr_blockwise_shift_scale`: `scale * (data - offset)`.
    Blockwise {
        /// Codes.
        data: Arc<Constant>,
        /// One for each block.
        scale: Arc<Constant>,
        /// Zero points, one for each block.
        offset: Option<Arc<Constant>>,
    },
    /// `constexpr_lut_to_dense`: entries of tables.
    Lut {
        /// Which entry.
        indices: Arc<Constant>,
        /// A table for each block.
        lut: Arc<Constant>,
        /// The dimension along which the elements of an entry follow on each other, where there are several.
        vector_axis: Option<usize>,
    },
    /// `constexpr_sparse_to_dense`: zeros where the mask is 0.
    Sparse {
        /// A bit for each element.
        mask: Arc<Constant>,
        /// The others in order: `[count]`; `SparseLut` and `SparseBlockwise` among others.
        values: Arc<Constant>,
    },
    /// Values of `constexpr_lut_to_sparse`, `[count]`.
    SparseLut {
        /// A bit for each element of the whole.
        mask: Arc<Constant>,
        /// Which entry, `[count]`.
        indices: Arc<Constant>,
        /// A table for each block of the whole.
        lut: Arc<Constant>,
    },
    /// Values of `constexpr_sparse_blockwise_shift_scale`, `[count]`.
    SparseBlockwise {
        /// A bit for each element of the whole.
        mask: Arc<Constant>,
        /// Codes, `[count]`.
        data: Arc<Constant>,
        /// One for each block of the whole.
        scale: Arc<Constant>,
        /// Zero points, one for each block of the whole.
        offset: Option<Arc<Constant>>,
    },
    /// What an operation makes that is not known, by its name.
    Unknown(String),
}

/// Where elements are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// In a weight file, by the name that the model has for it.
    File(Arc<str>, Blob),
    /// In the program: bytes as a weight file would hold them.
    Immediate(Arc<[u8]>),
}

impl Constant {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() } // below 2^64, as was checked
    }

    /// Constants that are decoded with it, in the order of the operation's parameters.
    pub fn parts(&self) -> Vec<(&'static str, &Arc<Constant>)> {
        let list = match &self.form {
            Form::Plain(_) | Form::Unknown(_) => vec![],
            Form::Blockwise { data, scale, offset } => {
                vec![("data", Some(data)), ("scale", Some(scale)), ("offset", offset.as_ref())]
            }
            Form::Lut { indices, lut, .. } => vec![("indices", Some(indices)), ("lut", Some(lut))],
            Form::Sparse { mask, values } => vec![("mask", Some(mask)), ("nonzero_data", Some(values))],
            Form::SparseLut { indices, lut, .. } => {
                vec![("indices_nonzero_data", Some(indices)), ("lut", Some(lut))]
            }
            Form::SparseBlockwise { data, scale, offset, .. } => {
                vec![("nonzero_data", Some(data)), ("scale", Some(scale)), ("offset", offset.as_ref())]
            }
        };
        list.into_iter().filter_map(|(name, part)| Some((name, part?))).collect()
    }

    /// Everything that is stored for it, in the order of [`Self::parts`]: parts of parts are in their place.
    pub fn stored(&self) -> Vec<(&Constant, &Place)> {
        match &self.form {
            Form::Plain(place) => vec![(self, place)],
            _ => self.parts().into_iter().flat_map(|(_, part)| part.stored()).collect(),
        }
    }

    /// Bytes of all that is stored for it.
    pub fn bytes(&self) -> u64 {
        self.stored().into_iter().map(|(_, place)| place.bytes()).fold(0, u64::saturating_add)
    }

    /// Whether something of it lies in a weight file.
    pub fn is_in_file(&self) -> bool {
        self.stored().iter().any(|(_, place)| matches!(place, Place::File(..)))
    }

    /// How it is encoded, in words: `int4, a scale per 1 x 32`, `2-bit palette per 8 rows`.
    pub fn encoding(&self) -> String {
        let block = |of: &[u64]| block(&self.shape, of);
        let offsets = |offset: &Option<Arc<Constant>>| {
            if offset.is_some() { "a scale and a zero point" } else { "a scale" }
        };
        let table = |lut: &Constant| match &lut.shape[..] {
            [groups @ .., _, elements] => {
                let vectors = if *elements > 1 { format!(", {elements} at a time") } else { String::new() };
                let entries = match &lut.form {
                    Form::Plain(_) if lut.data_type == DataType::Float16 => String::new(),
                    _ => format!(", entries {}", lut.encoding()),
                };
                format!("{}{vectors}{entries}", self::block(&self.shape, groups))
            }
            _ => "no table".into(),
        };
        let inner = |data: &Constant| match &data.form {
            Form::Plain(_) => data.data_type.to_string(),
            _ => data.encoding(),
        };
        match &self.form {
            Form::Plain(_) => self.data_type.to_string(),
            Form::Blockwise { data, scale, offset } => {
                format!("{}, {} {}", inner(data), offsets(offset), block(&scale.shape))
            }
            Form::Lut { indices, lut, .. } => {
                format!("{}-bit palette {}", indices.data_type.bits(), table(lut))
            }
            Form::Sparse { values, .. } => match &values.form {
                Form::SparseLut { indices, lut, .. } => {
                    format!("sparse {}-bit palette {}", indices.data_type.bits(), table(lut))
                }
                Form::SparseBlockwise { data, scale, offset, .. } => {
                    format!("sparse {}, {} {}", inner(data), offsets(offset), block(&scale.shape))
                }
                _ => format!("sparse {}", values.data_type),
            },
            Form::SparseLut { .. } | Form::SparseBlockwise { .. } => "values of a sparse one".into(),
            Form::Unknown(kind) => kind.clone(),
        }
    }
}

/// `per 1 x 32`, `per 8 rows`, `per tensor`.
fn block(whole: &[u64], groups: &[u64]) -> String {
    let sizes: Vec<(u64, u64)> =
        whole.iter().zip(groups).map(|(n, g)| (*n, n.checked_div(*g).unwrap_or(0))).collect();
    if sizes.iter().all(|(n, size)| n == size) {
        return "per tensor".into();
    }
    // The two ones behind the matrix of a convolution say nothing.
    let shown = sizes.len() - sizes.iter().rev().take_while(|(n, _)| *n == 1).count();
    match &sizes[..shown] {
        [before @ .., (_, rows), (n, cols)] if n == cols && before.iter().all(|(_, size)| *size == 1) => {
            if *rows == 1 {
                "per row".into()
            } else {
                format!("per {rows} rows")
            }
        }
        sizes => {
            let sizes: Vec<String> = sizes.iter().map(|(_, size)| size.to_string()).collect();
            format!("per {}", sizes.join(" x "))
        }
    }
}

impl Place {
    /// Bytes that are stored.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::File(_, blob) => blob.bytes,
            Self::Immediate(bytes) => bytes.len() as u64,
        }
    }
}

/// All constants of a function whose elements are numbers or truth values, in the order of its operations. Constants
/// inside of branches and loops are not among them.
///
/// # Errors
/// `Malformed` for parameters that do not fit together, or are no constants, with the operation; `Unsupported` for
/// more than four operations behind one another.
pub fn constants(package: &Package, function: &Function) -> Result<Vec<Arc<Constant>>> {
    let Some(block) = function.block_specializations.get(&function.opset) else {
        return Err(Error::malformed(format!("has no block for its opset {:?}", function.opset)));
    };
    let mut reader = Reader { package, by_name: HashMap::new() };
    let mut all = Vec::new();
    for operation in &block.operations {
        let named = |e: Error| {
            let name = operation.outputs.first().map_or("", |o| o.name.as_str());
            e.context(format_args!("{} {name:?}", operation.kind))
        };
        for constant in reader.results(operation).map_err(named)? {
            let constant = Arc::new(constant);
            let depth = 1 + constant.parts().iter().map(|(_, p)| reader.depth(p)).max().unwrap_or(0);
            if depth > DEPTH {
                return Err(named(Error::unsupported(format!(
                    "is decoded by {depth} operations behind one another, at most {DEPTH} are read"
                ))));
            }
            reader.by_name.insert(constant.name.clone(), (Arc::clone(&constant), depth));
            all.push(constant);
        }
    }
    Ok(all)
}

/// A value of an operation that is called `name`, as it is stored; `None` for texts, lists and so on.
///
/// # Errors
/// `Malformed` where it is not as its type says: for a value of the model, that was checked at opening.
pub fn constant(package: &Package, name: &str, value: &Value) -> Result<Option<Constant>> {
    Reader { package, by_name: HashMap::new() }.stored(name, value)
}

struct Reader<'a> {
    package: &'a Package,
    /// With the number of operations behind one another.
    by_name: HashMap<String, (Arc<Constant>, usize)>,
}

impl Reader<'_> {
    fn depth(&self, constant: &Constant) -> usize {
        self.by_name.get(&constant.name).map_or(0, |(_, depth)| *depth)
    }

    /// The constants that an operation gives: none where it is another operation.
    fn results(&self, operation: &Operation) -> Result<Vec<Constant>> {
        if operation.kind == "const" {
            let value = operation.attributes.get("val");
            let value = value.ok_or_else(|| Error::malformed("has no attribute val"))?;
            let name = operation.outputs.first().map_or("", |o| o.name.as_str());
            return Ok(self.stored(name, value)?.into_iter().collect());
        }
        if !operation.kind.starts_with("constexpr_") {
            return Ok(Vec::new());
        }
        if operation.inputs.is_empty() {
            let (name, tensor) = result(operation, 0)?;
            let form = Form::Unknown(operation.kind.clone());
            let shape = shape(tensor)?;
            return Ok(vec![Constant { name: name.into(), data_type: tensor.data_type, shape, form }]);
        }
        let decoded = match operation.kind.as_str() {
            "constexpr_blockwise_shift_scale" => vec![self.blockwise(operation)?],
            "constexpr_lut_to_dense" => vec![self.lut(operation)?],
            "constexpr_sparse_to_dense" => vec![self.sparse(operation)?],
            "constexpr_lut_to_sparse" => self.sparse_lut(operation)?,
            "constexpr_sparse_blockwise_shift_scale" => self.sparse_blockwise(operation)?,
            _ => {
                let forms = (0..operation.outputs.len()).map(|_| Form::Unknown(operation.kind.clone()));
                let unknown = |(n, form)| {
                    let (_, tensor) = result(operation, n)?;
                    Ok((tensor.data_type, shape(tensor)?, form))
                };
                forms.enumerate().map(unknown).collect::<Result<_>>()?
            }
        };
        if decoded.len() != operation.outputs.len() {
            let (found, wanted) = (operation.outputs.len(), decoded.len());
            return Err(Error::malformed(format!("gives {found} values, not {wanted}")));
        }
        let named = |(n, (data_type, shape, form)): (usize, (DataType, Vec<u64>, Form))| {
            let (name, tensor) = result(operation, n)?;
            let declared = self::shape(tensor)?;
            if (tensor.data_type, &declared) != (data_type, &shape) {
                return Err(Error::malformed(format!(
                    "decodes to {data_type} of shape {shape:?}, its type is {} of shape {declared:?}",
                    tensor.data_type
                )));
            }
            Ok(Constant { name: name.into(), data_type, shape, form })
        };
        decoded.into_iter().enumerate().map(named).collect()
    }

    fn blockwise(&self, operation: &Operation) -> Result<(DataType, Vec<u64>, Form)> {
        let (data, scale) = (self.get(operation, "data")?, self.get(operation, "scale")?);
        let offset = self.given(operation, "offset")?;
        check_groups("scale", &data.shape, &scale.shape)?;
        check_scale(&scale, offset.as_deref())?;
        Ok((scale.data_type, data.shape.clone(), Form::Blockwise { data, scale, offset }))
    }

    fn lut(&self, operation: &Operation) -> Result<(DataType, Vec<u64>, Form)> {
        let (indices, lut) = (self.get(operation, "indices")?, self.get(operation, "lut")?);
        let mut shape = indices.shape.clone();
        let elements = check_table(&shape, indices.data_type, &lut)?;
        let vector_axis = match (elements, self.axis(operation, shape.len())?) {
            (1, None) => None,
            (2.., Some(axis)) => {
                let size = shape[axis].checked_mul(elements);
                shape[axis] = size.ok_or_else(|| Error::malformed("has more than 2^64 elements"))?;
                check_elements(&shape)?;
                Some(axis)
            }
            // coremltools takes an axis for entries of one element, and makes nothing of it.
            (1, Some(_)) => None,
            _ => {
                return Err(Error::malformed(format!(
                    "has entries of {elements} elements and no vector_axis"
                )));
            }
        };
        Ok((lut.data_type, shape, Form::Lut { indices, lut, vector_axis }))
    }

    fn sparse(&self, operation: &Operation) -> Result<(DataType, Vec<u64>, Form)> {
        let (mask, values) = (self.mask(operation, "mask")?, self.get(operation, "nonzero_data")?);
        check_vector("nonzero_data", &values)?;
        if let Form::SparseLut { mask: of, .. } | Form::SparseBlockwise { mask: of, .. } = &values.form
            && (of.shape != mask.shape || of.form != mask.form)
        {
            return Err(Error::malformed("nonzero_data was decoded with another mask"));
        }
        Ok((values.data_type, mask.shape.clone(), Form::Sparse { mask, values }))
    }

    fn sparse_lut(&self, operation: &Operation) -> Result<Vec<(DataType, Vec<u64>, Form)>> {
        let mask = self.mask(operation, "indices_mask")?;
        let indices = self.get(operation, "indices_nonzero_data")?;
        let lut = self.get(operation, "lut")?;
        check_vector("indices_nonzero_data", &indices)?;
        if check_table(&mask.shape, indices.data_type, &lut)? > 1 {
            return Err(Error::unsupported("entries of several elements in what is sparse are not read"));
        }
        let values = (lut.data_type, indices.shape.clone());
        let first = (DataType::UInt1, mask.shape.clone(), same(&mask)?);
        Ok(vec![first, (values.0, values.1, Form::SparseLut { mask, indices, lut })])
    }

    fn sparse_blockwise(&self, operation: &Operation) -> Result<Vec<(DataType, Vec<u64>, Form)>> {
        let mask = self.mask(operation, "data_mask")?;
        let (data, scale) = (self.get(operation, "nonzero_data")?, self.get(operation, "scale")?);
        let offset = self.given(operation, "offset")?;
        check_vector("nonzero_data", &data)?;
        check_groups("scale", &mask.shape, &scale.shape)?;
        check_scale(&scale, offset.as_deref())?;
        let first = (DataType::UInt1, mask.shape.clone(), same(&mask)?);
        let values = (scale.data_type, data.shape.clone());
        Ok(vec![first, (values.0, values.1, Form::SparseBlockwise { mask, data, scale, offset })])
    }

    fn mask(&self, operation: &Operation, parameter: &str) -> Result<Arc<Constant>> {
        let mask = self.get(operation, parameter)?;
        match mask.data_type {
            DataType::UInt1 => Ok(mask),
            other => Err(Error::malformed(format!("{parameter} is {other}, uint1 was expected"))),
        }
    }

    fn axis(&self, operation: &Operation, rank: usize) -> Result<Option<usize>> {
        let Some(axis) = self.given(operation, "vector_axis")? else { return Ok(None) };
        let number = match (&axis.form, axis.data_type, axis.elements()) {
            (Form::Plain(Place::Immediate(bytes)), DataType::Int32, 1) => {
                bytes.first_chunk().map(|b| i64::from(i32::from_le_bytes(*b)))
            }
            _ => None,
        };
        let from_end = number.and_then(|n| if n < 0 { n.checked_add_unsigned(rank as u64) } else { Some(n) });
        let axis = from_end.and_then(|n| usize::try_from(n).ok()).filter(|n| *n < rank);
        axis.map(Some).ok_or_else(|| Error::malformed(format!("vector_axis is none of {rank} dimensions")))
    }

    fn get(&self, operation: &Operation, parameter: &str) -> Result<Arc<Constant>> {
        let given = self.given(operation, parameter)?;
        given.ok_or_else(|| Error::malformed(format!("{parameter} is missing")))
    }

    /// What a parameter is bound to.
    fn given(&self, operation: &Operation, parameter: &str) -> Result<Option<Arc<Constant>>> {
        let Some(argument) = operation.inputs.get(parameter) else { return Ok(None) };
        let none = |what: &str| Error::malformed(format!("{parameter} {what}"));
        match &argument.0[..] {
            [Binding::Name(name)] => match self.by_name.get(name) {
                Some((constant, _)) => Ok(Some(Arc::clone(constant))),
                None => Err(none(&format!("is {name:?}, which is no constant before it"))),
            },
            [Binding::Value(value)] => {
                let name = operation.outputs.first().map_or("", |o| o.name.as_str());
                let stored = self.stored(&format!("{name}/{parameter}"), value);
                let stored = stored.map_err(|e| e.context(parameter))?;
                stored.map(|c| Some(Arc::new(c))).ok_or_else(|| none("holds no numbers"))
            }
            [_] => Err(none("is bound to nothing")),
            several => Err(none(&format!("has {} values, not one", several.len()))),
        }
    }

    /// A value as it is stored; `None` for texts, lists and so on.
    fn stored(&self, name: &str, value: &Value) -> Result<Option<Constant>> {
        let ValueType::Tensor(tensor) = &value.value_type else { return Ok(None) };
        let place = match &value.stored {
            Stored::Blob(at) => {
                let (_, blob) = self.package.blob(at, tensor)?;
                Place::File(at.file_name.as_str().into(), *blob)
            }
            Stored::Immediate(ImmediateValue::Tensor(held)) => match bytes(tensor, held) {
                Some(bytes) => Place::Immediate(bytes.into()),
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        let form = Form::Plain(place);
        Ok(Some(Constant { name: name.into(), data_type: tensor.data_type, shape: shape(tensor)?, form }))
    }
}

/// The first result of `constexpr` operations on what is sparse is the mask that they are given.
fn same(mask: &Constant) -> Result<Form> {
    match &mask.form {
        Form::Plain(place) => Ok(Form::Plain(place.clone())),
        _ => Err(Error::malformed("has a mask that is not stored")),
    }
}

fn result(operation: &Operation, n: usize) -> Result<(&str, &TensorType)> {
    let output = operation.outputs.get(n).ok_or_else(|| Error::malformed("gives no value"))?;
    match &output.value_type {
        ValueType::Tensor(tensor) => Ok((&output.name, tensor)),
        _ => Err(Error::malformed(format!("gives {:?}, which is no tensor", output.name))),
    }
}

fn shape(tensor: &TensorType) -> Result<Vec<u64>> {
    tensor.elements()?;
    tensor.fixed_shape()
}

fn check_elements(shape: &[u64]) -> Result<()> {
    let product = shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size));
    product.map(drop).ok_or_else(|| Error::malformed("has more than 2^64 elements"))
}

/// That blocks divide the whole along each dimension.
fn check_groups(what: &str, whole: &[u64], groups: &[u64]) -> Result<()> {
    let fits = whole.len() == groups.len() && whole.iter().zip(groups).all(|(n, g)| *g > 0 && n % g == 0);
    if fits {
        return Ok(());
    }
    Err(Error::malformed(format!("{what} has shape {groups:?}, which does not divide {whole:?}")))
}

fn check_scale(scale: &Constant, offset: Option<&Constant>) -> Result<()> {
    check_shared("scale", scale)?;
    offset.map_or(Ok(()), |offset| check_shared("offset", offset))?;
    match offset {
        Some(offset) if offset.shape != scale.shape => {
            Err(Error::malformed(format!("offset has shape {:?}, scale {:?}", offset.shape, scale.shape)))
        }
        _ => Ok(()),
    }
}

/// That what elements share is not out of tables itself: it is at most 8 elements for each byte that is stored.
fn check_shared(what: &str, shared: &Constant) -> Result<()> {
    fn is_palette(constant: &Constant) -> bool {
        match &constant.form {
            Form::Plain(_) | Form::Unknown(_) => false,
            Form::Blockwise { .. } => constant.parts().iter().any(|(_, part)| is_palette(part)),
            _ => true,
        }
    }
    match is_palette(shared) {
        true => {
            let (name, encoding) = (&shared.name, shared.encoding());
            Err(Error::unsupported(format!(
                "{what} {name:?} is {encoding}: stored or scaled numbers are read"
            ))
            .hint("decode the table once, and store what it gives"))
        }
        false => Ok(()),
    }
}

/// Returns the elements of an entry.
fn check_table(whole: &[u64], indices: DataType, lut: &Constant) -> Result<u64> {
    let [groups @ .., entries, elements] = &lut.shape[..] else {
        return Err(Error::malformed(format!("lut has shape {:?}, which is no table's", lut.shape)));
    };
    check_groups("lut", whole, groups)?;
    check_shared("lut", lut)?;
    if *elements > MOST_WIDE {
        return Err(Error::limit(format!(
            "lut has entries of {elements} elements, at most {MOST_WIDE} are read"
        )));
    }
    let bits = indices.bits();
    if !(1..=8).contains(&bits) || *entries != 1 << bits || *elements == 0 {
        return Err(Error::malformed(format!(
            "lut has {entries} entries of {elements}, indices are {indices}"
        )));
    }
    Ok(*elements)
}

fn check_vector(what: &str, values: &Constant) -> Result<()> {
    match values.shape.len() {
        1 => Ok(()),
        _ => Err(Error::malformed(format!("{what} has shape {:?}, a vector was expected", values.shape))),
    }
}

/// The elements of a tensor in the program as a weight file would hold them; `None` for texts.
fn bytes(tensor: &TensorType, held: &TensorValue) -> Option<Vec<u8>> {
    Some(match held {
        TensorValue::None => Vec::new(),
        TensorValue::Floats(v) => v.0.iter().flat_map(|x| x.to_le_bytes()).collect(),
        TensorValue::Ints(v) => {
            let size = tensor.data_type.bits() as usize / 8;
            v.0.iter().flat_map(|x| x.to_le_bytes().into_iter().take(size)).collect()
        }
        TensorValue::Bools(v) => v.0.iter().map(|x| u8::from(*x)).collect(),
        TensorValue::Strings(_) => return None,
        TensorValue::LongInts(v) => v.0.iter().flat_map(|x| x.to_le_bytes()).collect(),
        TensorValue::Doubles(v) => v.0.iter().flat_map(|x| x.to_le_bytes()).collect(),
        TensorValue::Bytes(v) => v.0.clone(),
    })
}
