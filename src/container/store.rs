//! The tensors of a checkpoint: those that lie in its files, and those that are made of them.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::grouped::Grouped;
use super::qpack::planes::Compressed;
use super::{InputFile, LowRank, endian};
use crate::error::{Error, Result};
use crate::tensor::{DType, StridedCopy, TensorInfo};

/// The tensors of a checkpoint, over one or many files, in the order of the source.
#[derive(Debug, Default)]
pub struct Store {
    stored: Stored,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    views: HashMap<String, Box<dyn View>>,
    /// What joined tensors take the place of.
    parts: HashMap<String, Vec<TensorInfo>>,
    /// What is added to the values of some tensors.
    added: HashMap<String, Vec<LowRank>>,
}

/// The files behind a [`Store`], and how tensors lie in them.
#[derive(Debug, Default)]
pub struct Stored {
    files: Vec<InputFile>,
    big_endian: bool,
    /// Tensors whose elements do not lie in order: how they do, from the tensor's offset on.
    strided: HashMap<String, StridedCopy>,
    /// Tensors whose bytes are compressed.
    compressed: HashMap<String, Compressed>,
}

/// How the data of a tensor come out of those it is made of.
pub trait View: Debug + Send + Sync {
    /// Fills `out` with the data from element `start` on, in the tensor's own type, little-endian
    /// and row-major. Both ends are those of blocks, and lie within the tensor.
    ///
    /// # Errors
    /// As reads fail; `Malformed` for parts that contradict each other.
    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()>;

    /// Whether what a row is made of lies apart, so that small reads are slow.
    fn is_scattered(&self) -> bool {
        false
    }

    /// How wide its codes are, and what shares a scale.
    fn packing(&self) -> Packing;

    /// The integers in groups that it decodes, where it does.
    fn grouped(&self) -> Option<&Arc<dyn Grouped>> {
        None
    }
}

/// How the weights of a joined tensor are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    /// Bits of a code.
    pub bits: u32,
    /// Rows and columns of the weights that share a scale; columns may go on into the next row, and 0 are
    /// all of a row.
    pub block: [u64; 2],
}

/// A tensor that several stored ones make up.
#[derive(Debug)]
pub struct Joined {
    /// Its name; one of its parts may have the same.
    pub name: String,
    /// Type of the data that `view` gives.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Names of the tensors that it takes the place of.
    pub parts: Vec<String>,
    /// Its data.
    pub view: Box<dyn View>,
}

impl Store {
    /// Joins files and the tensors within them.
    ///
    /// # Errors
    /// `Malformed` when a name appears twice, or a tensor's bytes leave its file.
    pub fn new(files: Vec<InputFile>, tensors: Vec<TensorInfo>) -> Result<Self> {
        Self::with_compressed(files, tensors, HashMap::new())
    }

    /// As [`Self::new`], of tensors some of which are compressed, by name: their bytes are those without.
    ///
    /// # Errors
    /// As there.
    pub(super) fn with_compressed(
        files: Vec<InputFile>,
        tensors: Vec<TensorInfo>,
        compressed: HashMap<String, Compressed>,
    ) -> Result<Self> {
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            let file = files
                .get(t.file)
                .ok_or_else(|| Error::malformed(format!("tensor {:?} has no file", t.name)))?;
            let is_cut = t.offset.checked_add(t.nbytes).is_none_or(|end| end > file.len());
            if is_cut && !compressed.contains_key(&t.name) {
                return Err(Error::malformed(format!(
                    "tensor {:?} takes {} bytes at offset {}, the file has {}",
                    t.name,
                    t.nbytes,
                    t.offset,
                    file.len()
                ))
                .at(file.path())
                .hint("the file is cut short: fetch it again"));
            }
            if by_name.insert(t.name.clone(), i).is_some() {
                return Err(Error::malformed(format!("tensor {:?} appears twice", t.name)).at(file.path()));
            }
        }
        let stored = Stored { files, compressed, ..Stored::default() };
        Ok(Self { stored, tensors, by_name, ..Self::default() })
    }

    /// Declares the data big-endian: [`Self::read`] then turns every element round.
    pub(crate) fn into_big_endian(mut self) -> Self {
        self.stored.big_endian = true;
        self
    }

    /// Declares how the elements of some tensors lie, by name: [`Self::read`] then brings them into
    /// row-major order. No copy may reach beyond its file.
    pub(crate) fn with_strided(mut self, strided: HashMap<String, StridedCopy>) -> Self {
        self.stored.strided = strided;
        self
    }

    /// Puts joined tensors in the place of their parts, each where the first of these was.
    ///
    /// # Errors
    /// `Malformed` when a name is taken, a part is missing or has been joined already, or a shape
    /// does not fit its type.
    pub fn join(mut self, joined: Vec<Joined>) -> Result<Self> {
        let mut gone = HashSet::new();
        let mut at_place: HashMap<usize, TensorInfo> = HashMap::new();
        for Joined { name, dtype, shape, parts, view } in joined {
            let context = |e: Error| e.context(format!("tensor {name:?}"));
            let nbytes = dtype.nbytes(&shape).map_err(context)?;
            let mut place = self.tensors.len();
            let mut infos = Vec::with_capacity(parts.len());
            for part in &parts {
                let at = self.by_name.get(part).copied().filter(|&at| gone.insert(at)).ok_or_else(|| {
                    context(Error::malformed(format!("its part {part:?} is missing, or part of another")))
                })?;
                place = place.min(at);
                infos.extend(self.tensors.get(at).cloned());
            }
            if self.by_name.contains_key(&name) && !parts.contains(&name) || self.views.contains_key(&name) {
                return Err(context(Error::malformed("is there, and packed as well"))
                    .hint("one of the two is left over from another version of the model"));
            }
            let first = self.tensors.get(place).ok_or_else(|| context(Error::malformed("has no parts")))?;
            let info = TensorInfo { name, dtype, shape, file: first.file, offset: first.offset, nbytes };
            self.views.insert(info.name.clone(), view);
            self.parts.insert(info.name.clone(), infos);
            at_place.insert(place, info);
        }
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors
            .into_iter()
            .enumerate()
            .filter_map(|(i, t)| at_place.remove(&i).or((!gone.contains(&i)).then_some(t)))
            .collect();
        self.by_name = self.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(self)
    }

    /// Declares that a product is to be added to the values of the tensor called `name`, by whoever
    /// decodes them: [`Self::read`] gives the data without.
    pub fn add(&mut self, name: &str, product: LowRank) {
        self.added.entry(name.to_string()).or_default().push(product);
    }

    /// What is to be added to the values of the tensor called `name`, in this order.
    pub fn added(&self, name: &str) -> &[LowRank] {
        self.added.get(name).map_or(&[], Vec::as_slice)
    }

    /// Whether small reads of the tensor are slow: its elements lie apart in the file, or are compressed.
    pub fn is_scattered(&self, tensor: &TensorInfo) -> bool {
        let is_compressed = |t: &TensorInfo| self.stored.compressed.contains_key(&t.name);
        match self.views.get(&tensor.name) {
            Some(view) => {
                let parts = self.parts.get(&tensor.name);
                view.is_scattered() || parts.is_some_and(|parts| parts.iter().any(is_compressed))
            }
            None => self.stored.strided.contains_key(&tensor.name) || is_compressed(tensor),
        }
    }

    /// Whether the tensor is joined from others ([`Self::join`]).
    pub fn is_joined(&self, tensor: &TensorInfo) -> bool {
        self.views.contains_key(&tensor.name)
    }

    /// How a joined tensor is packed, and the stored tensors that it takes the place of.
    pub fn packing(&self, tensor: &TensorInfo) -> Option<(Packing, &[TensorInfo])> {
        Some((self.views.get(&tensor.name)?.packing(), self.parts.get(&tensor.name)?))
    }

    /// The integers in groups behind a joined tensor, and the files they are read from.
    pub fn grouped(&self, tensor: &TensorInfo) -> Option<(&Arc<dyn Grouped>, &Stored)> {
        Some((self.views.get(&tensor.name)?.grouped()?, &self.stored))
    }

    /// Lets a joined tensor give its values in another type, by another view of the same parts.
    ///
    /// # Errors
    /// `Misuse` for a tensor that is not joined, or whose shape does not fit the type.
    pub fn give_as(&mut self, name: &str, dtype: DType, view: Box<dyn View>) -> Result<()> {
        let at = self.by_name.get(name).copied().filter(|_| self.views.contains_key(name));
        let at = at.ok_or_else(|| Error::misuse(format!("tensor {name:?} is not joined")))?;
        self.tensors[at].nbytes = dtype.nbytes(&self.tensors[at].shape)?;
        self.tensors[at].dtype = dtype;
        self.views.insert(name.to_string(), view);
        Ok(())
    }

    /// The files behind it, and how tensors lie in them.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// All files.
    pub fn files(&self) -> &[InputFile] {
        &self.stored.files
    }

    /// All tensors, in source order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Fills `buf` from byte `offset` of the tensor's data; the data is little-endian and row-major
    /// whatever the file's order.
    ///
    /// # Errors
    /// `Malformed` when the range leaves the tensor, `Io` when the read fails. For a big-endian
    /// file also `Unsupported` when the block type has no defined big-endian layout, and for it,
    /// for strided and for joined tensors `Misuse` when the range is not whole blocks.
    pub fn read(&self, tensor: &TensorInfo, offset: u64, buf: &mut [u8]) -> Result<()> {
        let Some(view) = self.views.get(&tensor.name) else {
            return self.stored.read(tensor, offset, buf);
        };
        check_range(tensor, offset, buf.len())?;
        check_blocks(tensor, offset, buf.len())?;
        let start = offset / tensor.dtype.type_size() * tensor.dtype.block_size();
        view.read(&self.stored, start, buf).map_err(|e| match e.path() {
            Some(_) => e,
            None => e.context(format_args!("tensor {:?}", tensor.name)),
        })
    }

    /// All bytes of a small tensor.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_all(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        // `nbytes` lies within the file, or a small multiple of it: no file asks for more.
        let mut buf = Vec::new();
        crate::work::resize(&mut buf, tensor.nbytes as usize, 0)?;
        self.read(tensor, 0, &mut buf)?;
        Ok(buf)
    }
}

impl Stored {
    /// All files.
    pub fn files(&self) -> &[InputFile] {
        &self.files
    }

    /// The bytes of its file that a tensor lies in as it is; `None` where they are to be moved or decompressed.
    pub fn place(&self, tensor: &TensorInfo) -> Option<Range<u64>> {
        let is_moved = self.big_endian && tensor.dtype.type_size() > 1
            || self.strided.contains_key(&tensor.name)
            || self.compressed.contains_key(&tensor.name);
        let end = tensor.offset.checked_add(tensor.nbytes)?;
        (!is_moved && end <= self.files.get(tensor.file)?.len()).then_some(tensor.offset..end)
    }

    /// As [`Store::read`], of a tensor that lies in a file.
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, tensor: &TensorInfo, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(tensor, offset, buf.len())?;
        let file = self.files.get(tensor.file);
        let at = tensor.offset.checked_add(offset);
        let (Some(file), Some(at)) = (file, at) else {
            return Err(Error::misuse(format!("tensor {:?} is not of this store", tensor.name)));
        };
        if let Some(compressed) = self.compressed.get(&tensor.name) {
            return compressed
                .read(file, offset, buf)
                .map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)).at(file.path()));
        }
        let size = tensor.dtype.type_size();
        let copy = self.strided.get(&tensor.name);
        if self.big_endian || copy.is_some() {
            check_blocks(tensor, offset, buf.len())?;
        }
        match copy {
            None => file.read_at(at, buf)?,
            Some(copy) => {
                let (start, mut scratch) = (offset / size, Vec::new());
                for part in copy.clip(start, start + buf.len() as u64 / size) {
                    let mut fetch = |unit: u64, buf: &mut [u8]| {
                        let at = unit.checked_mul(size).and_then(|n| n.checked_add(tensor.offset));
                        file.read_at(at.unwrap_or(u64::MAX), buf)
                    };
                    part.gather(start, size, buf, &mut scratch, &mut fetch)?;
                }
            }
        }
        if self.big_endian {
            endian::swap(tensor.dtype, buf)
                .map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)))?;
        }
        Ok(())
    }
}

fn check_range(tensor: &TensorInfo, offset: u64, len: usize) -> Result<()> {
    if offset.checked_add(len as u64).is_none_or(|end| end > tensor.nbytes) {
        return Err(Error::malformed(format!(
            "{len} bytes at {offset} lie beyond tensor {:?} of {} bytes",
            tensor.name, tensor.nbytes
        )));
    }
    Ok(())
}

fn check_blocks(tensor: &TensorInfo, offset: u64, len: usize) -> Result<()> {
    let size = tensor.dtype.type_size();
    if offset.is_multiple_of(size) && (len as u64).is_multiple_of(size) {
        return Ok(());
    }
    Err(Error::misuse(format!("a range within a block of {}", tensor.dtype)))
}
