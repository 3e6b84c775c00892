//! The plan: every tensor with its type, place and source, before one tensor byte is read.

use std::path::PathBuf;
use std::sync::Arc;

use super::fold::{self, FoldPlan};
use super::gather::Source;
use super::moved::Moved;
use super::outcome::Fallback;
use super::pack::{Packing, PartPlan};
use super::readers::Readers;
use crate::block::gram::PANEL;
use crate::block::{Lattice, codec};
use crate::container::imatrix::{Entry, ImportanceMatrix};
use crate::container::moments::{Input, Moments};
use crate::container::shards::{Ending, FileLayout};
use crate::error::{Error, Result};
use crate::quantize::Method;
use crate::tensor::DType;

/// A whole conversion, laid out.
#[derive(Debug)]
pub struct Plan {
    /// Tensors in output order.
    pub tensors: Vec<TensorPlan>,
    /// Scales that move between tensors.
    pub folds: Vec<FoldPlan>,
    /// Files to write.
    pub files: Vec<FilePlan>,
    /// What the user should know: fallbacks, warnings, what was recognised and how.
    pub notes: Vec<String>,
    /// Whether it is found out what each tensor loses by being stored in another type.
    pub measures: bool,
    /// Whether a tensor that loses something ends the conversion.
    pub exact_only: bool,
    /// Why this cannot be carried out, although it can be shown.
    pub obstacle: Option<Obstacle>,
}

/// What stands between a plan and its execution.
#[derive(Clone, Debug)]
pub struct Obstacle {
    /// What is wrong.
    pub message: String,
    /// What would help.
    pub hint: String,
    /// Whether `force` overcomes it.
    pub yields: bool,
}

/// The importance of a tensor's columns, read as it is needed: one value for each column, of each expert.
#[derive(Clone, Debug)]
pub enum Importance {
    /// Of an importance matrix.
    Matrix {
        /// The opened file.
        matrix: Arc<ImportanceMatrix>,
        /// Its entry.
        entry: Entry,
    },
    /// The mean squares among second moments.
    Diagonal {
        /// The opened file.
        moments: Arc<Moments>,
        /// Its entry.
        input: Input,
    },
}

impl Importance {
    /// The importance of one expert's columns (0 where there are none), as many as `out` takes.
    ///
    /// # Errors
    /// `Misuse` for an expert that is not there; `Io`; `Malformed` for moments that no sum of squares has.
    pub fn read(&self, expert: u64, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Matrix { matrix, entry } => matrix.read(entry, expert, out),
            Self::Diagonal { moments, input } => moments.mean_squares(input, expert, out),
        }
    }
}

/// How weights become codes.
#[derive(Clone, Debug)]
pub enum Rounding {
    /// Each block by itself.
    Nearest,
    /// Each row by the search that importance brings, every column counting alike.
    Even,
    /// Each row, its errors weighed.
    Weighed(Importance),
    /// By second moments.
    Guided(Box<Guide>),
}

/// The second moments of a matrix's input, and what is made of them.
#[derive(Clone, Debug)]
pub struct Guide {
    /// The opened file.
    pub moments: Arc<Moments>,
    /// Its entry.
    pub input: Input,
    /// The method.
    pub method: Method,
    /// The values that weights can take.
    pub lattice: Lattice,
    /// What stands in the place of moments, where the tensor is no factor of a product: the name in
    /// `input` is then its own.
    pub readers: Option<Arc<Readers>>,
}

impl Guide {
    /// Bytes that preparing takes at most, and those that are then kept.
    fn bytes(&self) -> (u64, u64) {
        let (making, kept) = self.method.bytes(self.input.columns);
        (making.saturating_add(self.readers.as_ref().map_or(0, |r| r.bytes())), kept)
    }
}

/// One output file: its leading bytes, and its length.
#[derive(Debug)]
pub struct FilePlan {
    /// Name, relative to the output.
    pub name: PathBuf,
    /// Everything before the tensor data.
    pub header: Vec<u8>,
    /// Length of the finished file.
    pub len: u64,
    /// What is written last, since it depends on the data.
    pub ending: Option<Ending>,
}

impl FilePlan {
    /// A file that holds these bytes and no tensors.
    pub fn whole(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), len: bytes.len() as u64, header: bytes, ending: None }
    }
}

impl From<FileLayout> for FilePlan {
    fn from(f: FileLayout) -> Self {
        Self { name: f.name.into(), header: f.header, len: f.len, ending: f.ending }
    }
}

/// One output tensor.
#[derive(Debug)]
pub struct TensorPlan {
    /// Name in the output.
    pub name: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Type in the output.
    pub dtype: DType,
    /// The type that was wanted, where `dtype` is a fallback.
    pub wanted: Option<DType>,
    /// Where its values come from.
    pub source: Source,
    /// How its weights become codes, where they are not copied.
    pub rounding: Rounding,
    /// The tensors that are written in its place, where it is a matrix of a quantized checkpoint.
    pub packing: Option<Box<Packing>>,
    /// The tensors that its bytes are moved into, without being decoded.
    pub moved: Option<Box<Moved>>,
    /// Why that is not, or not everywhere, what was asked for.
    pub fallback: Option<Fallback>,
    /// Which output file.
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Bytes.
    pub nbytes: u64,
}

impl TensorPlan {
    /// A tensor whose place is not known yet.
    ///
    /// # Errors
    /// `Unsupported` when the values can be neither copied nor converted.
    pub fn new(
        name: String,
        shape: Vec<u64>,
        dtype: DType,
        wanted: Option<DType>,
        source: Source,
    ) -> Result<Self> {
        let context = |e: Error| e.context(format!("tensor {name:?}"));
        let nbytes = dtype.nbytes(&shape).map_err(context)?;
        let rounding = Rounding::Nearest;
        let planned = Self {
            name,
            shape,
            dtype,
            wanted,
            source,
            rounding,
            packing: None,
            moved: None,
            fallback: None,
            file: 0,
            offset: 0,
            nbytes,
        };
        planned.check()?;
        Ok(planned)
    }

    /// A tensor of so many elements that is moved.
    ///
    /// # Errors
    /// `Malformed` for impossible sizes.
    pub fn moved(name: String, shape: Vec<u64>, moved: Moved) -> Result<Self> {
        let sizes = moved.parts.iter().map(|p| p.dtype.nbytes(&p.shape));
        let nbytes = sizes.sum::<Result<u64>>()?;
        // What has no elements may have bytes all the same.
        let source = Source::moved(crate::tensor::elements(&shape)?.max(1));
        Ok(Self {
            name,
            shape,
            dtype: DType::U8,
            wanted: None,
            source,
            rounding: Rounding::Nearest,
            packing: None,
            moved: Some(Box::new(moved)),
            fallback: None,
            file: 0,
            offset: 0,
            nbytes,
        })
    }

    /// The tensors that are written in its place, where there are such.
    pub fn parts(&self) -> Option<&[PartPlan]> {
        let packed = self.packing.as_ref().map(|p| p.parts.as_slice());
        packed.or(self.moved.as_ref().map(|m| m.parts.as_slice()))
    }

    /// Names, types and shapes of what is written: the tensor, or its parts.
    pub(super) fn written(&self) -> Vec<(&str, DType, &[u64])> {
        match self.parts() {
            Some(parts) => parts.iter().map(|p| (p.name.as_str(), p.dtype, p.shape.as_slice())).collect(),
            None => vec![(self.name.as_str(), self.dtype, self.shape.as_slice())],
        }
    }

    /// Places in the output: that of the tensor, or of each of its parts.
    fn places_mut(&mut self) -> Vec<(&mut usize, &mut u64)> {
        let packed = self.packing.iter_mut().flat_map(|p| &mut p.parts);
        let parts = packed.chain(self.moved.iter_mut().flat_map(|m| &mut m.parts));
        let places: Vec<_> = parts.map(|p| (&mut p.file, &mut p.offset)).collect();
        if places.is_empty() { vec![(&mut self.file, &mut self.offset)] } else { places }
    }

    /// Whether its values can be copied or converted.
    ///
    /// # Errors
    /// `Unsupported` when not.
    pub(super) fn check(&self) -> Result<()> {
        if self.is_plain() {
            return Ok(());
        }
        let context = |e: Error| e.context(format!("tensor {:?}", self.name));
        self.source.check_decodable().map_err(context)?;
        match codec(self.dtype).is_some_and(|c| c.can_encode()) {
            true => Ok(()),
            false => Err(context(Error::unsupported(format!("type {} cannot be written yet", self.dtype)))),
        }
    }

    /// Whether bytes are copied as they are.
    pub fn is_plain(&self) -> bool {
        self.packing.is_none() && self.moved.is_none() && self.source.is_plain(self.dtype)
    }

    /// Whether a method rounds it, by second moments.
    pub(super) fn takes_long(&self) -> bool {
        matches!(self.rounding, Rounding::Guided(_))
    }

    /// What its type is called: that of a packed matrix is the format.
    pub fn type_name(&self) -> &'static str {
        let moved = self.moved.as_ref().map(|m| m.kind);
        self.packing.as_ref().map(|p| p.format).or(moved).unwrap_or(self.dtype.name())
    }

    /// Whether weights become codes of blocks.
    pub fn is_rounded(&self) -> bool {
        match &self.packing {
            Some(packing) => packing.origin.is_none(),
            None => self.dtype.is_block() && self.moved.is_none() && !self.is_plain(),
        }
    }

    /// Weights in a row, and rows that share an importance: those of one expert.
    pub fn rows(&self) -> (u64, u64) {
        let mut from_inside = self.shape.iter().rev().copied();
        (from_inside.next().unwrap_or(1).max(1), from_inside.next().unwrap_or(1).max(1))
    }
}

/// What the workers may use.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Worker threads.
    pub threads: usize,
    /// Bytes for all buffers of all workers together.
    pub memory: u64,
    /// Whether the user set these bytes. Otherwise what must be in memory may take more.
    pub strict: bool,
}

/// Elements of a span: small enough that the buffers of a worker stay in its cache.
const SPAN: u64 = 128 << 10;
/// Spans that are gathered from many places are larger, so that each read is long.
const SCATTERED_SPAN: u64 = 1 << 20;
const MIN_SPAN: u64 = 8 << 10;
/// Bytes of buffers for one element of a span: source, stretch (4x), value, output.
const BYTES_PER_ELEMENT: u64 = 8 + 16 + 4 + 4;
/// Spans whose rows lie apart in the output as well are larger still, and of bytes alone: source, codes as they
/// were and as they will be, output.
const MOVED_SPAN: u64 = 4 << 20;
const BYTES_PER_CODE: u64 = 8;
/// Elements that are noted as one where they are copied, and where they become blocks.
const NOTED: u64 = 8 << 20;
const NOTED_BLOCKS: u64 = 2 << 20;
/// Spans end where blocks end.
const ALIGN: u64 = 256;

/// Whether codes are moved, so that no floats are needed.
fn is_moved(tensor: &TensorPlan) -> bool {
    tensor.packing.as_ref().is_some_and(|p| p.origin.is_some())
}

fn bytes_per_element(tensor: &TensorPlan) -> u64 {
    if is_moved(tensor) { BYTES_PER_CODE } else { BYTES_PER_ELEMENT }
}

impl Budget {
    /// Threads as the machine has cores, and 64 MiB of buffers for each.
    pub fn new(threads: Option<usize>, memory: Option<u64>) -> Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.unwrap_or_else(cores).clamp(1, 256);
        let strict = memory.is_some();
        let memory = memory.unwrap_or(64 << 20);
        let least = MIN_SPAN * BYTES_PER_ELEMENT * threads as u64;
        if memory < least {
            return Err(Error::misuse(format!(
                "--max-memory {memory} is too little for {threads} threads, which need {least} bytes"
            ))
            .hint("give more memory or fewer threads (-j)"));
        }
        Ok(Self { threads, memory, strict })
    }

    /// Into how many spans the work on `tensor` falls.
    pub(super) fn spans(&self, tensor: &TensorPlan) -> u64 {
        match &tensor.moved {
            Some(moved) => moved.spans(),
            None => tensor.source.elements().div_ceil(self.span(tensor)),
        }
    }

    /// Elements in each span of `tensor`, the last may be shorter; 1 where something else tells spans apart.
    pub fn span(&self, tensor: &TensorPlan) -> u64 {
        if tensor.moved.is_some() {
            return 1;
        }
        let held = tensor.source.held_bytes(SCATTERED_SPAN);
        let most = (self.memory / self.threads as u64).saturating_sub(held) / bytes_per_element(tensor);
        let scattered = !tensor.source.is_contiguous() || tensor.packing.is_some();
        let wish = match scattered {
            _ if is_moved(tensor) => MOVED_SPAN,
            true => SCATTERED_SPAN,
            false => SPAN,
        };
        let span = wish.min(most).max(MIN_SPAN);
        let (row, _) = tensor.rows();
        if let Some(packing) = &tensor.packing {
            let unit = row.saturating_mul(packing.layout.unit(row));
            return (span / unit * unit).max(unit);
        }
        match tensor.rounding {
            // Rows are weighed as a whole.
            Rounding::Even | Rounding::Weighed(_) => return (span / row * row).max(row),
            // So many rows are rounded side by side.
            Rounding::Guided(_) => return row.saturating_mul(PANEL as u64),
            Rounding::Nearest => {}
        }
        if row <= span && row.is_multiple_of(tensor.dtype.block_size()) {
            // Whole rows where they fit, whole blocks anyway.
            span / row * row
        } else {
            span / ALIGN * ALIGN
        }
    }

    /// How many spans are noted as one: bytes that are quickly made are noted in large pieces.
    pub(super) fn noted_together(&self, tensor: &TensorPlan) -> u64 {
        let spans = match tensor.rounding {
            _ if tensor.packing.is_some() || tensor.moved.is_some() => 1,
            Rounding::Nearest if !tensor.dtype.is_block() || tensor.is_plain() => NOTED,
            Rounding::Nearest => NOTED_BLOCKS,
            _ => return 1,
        };
        (spans / self.span(tensor)).max(1)
    }

    /// Bytes of a worker's buffers for a tensor.
    fn buffer_bytes(&self, t: &TensorPlan) -> u64 {
        if let Some(moved) = &t.moved {
            return moved.buffer_bytes(t.nbytes);
        }
        let buffers = self.span(t).min(t.source.elements()).saturating_mul(bytes_per_element(t));
        buffers.saturating_add(t.source.held_bytes(SCATTERED_SPAN))
    }

    /// Most bytes that buffers can take.
    pub fn peak(&self, plan: &Plan) -> u64 {
        let most = plan.tensors.iter().map(|t| self.buffer_bytes(t)).max().unwrap_or(0);
        let guides = plan.tensors.iter().filter_map(|t| match &t.rounding {
            Rounding::Guided(guide) => Some(guide.bytes()),
            _ => None,
        });
        // One is made at a time, while others are in use.
        let (making, kept) = guides.fold((0, 0), |(a, b), (c, d)| (c.max(a), d.max(b)));
        let guides = kept.saturating_mul(self.threads as u64).saturating_add(making);
        let streaming = most.saturating_mul(self.threads as u64).saturating_add(guides);
        // Scales are found before.
        streaming.max(fold::peak(plan, self.threads))
    }

    /// Whether the plan can be streamed within the memory.
    ///
    /// # Errors
    /// `Misuse` when what must be in memory as a whole does not fit.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        let peak = self.peak(plan);
        if peak <= self.memory || !self.strict {
            return Ok(());
        }
        let largest = plan.tensors.iter().max_by_key(|t| self.buffer_bytes(t));
        let name = largest.map_or("", |t| t.name.as_str());
        Err(Error::misuse(format!(
            "--max-memory {} is too little: {peak} bytes are needed for {name:?} on {} threads (whole rows with an importance matrix, an adapter's factors to merge it, what a method makes of second moments)",
            self.memory, self.threads
        ))
        .hint("give more memory or fewer threads (-j)"))
    }
}

impl Plan {
    /// A plan for tensors in this order, whose files are not laid out yet.
    pub fn new(tensors: Vec<TensorPlan>) -> Self {
        Self {
            tensors,
            folds: Vec::new(),
            files: Vec::new(),
            notes: Vec::new(),
            measures: false,
            exact_only: false,
            obstacle: None,
        }
    }

    /// Gives what is written its places, file and first byte, in the order of [`TensorPlan::written`].
    pub(super) fn place(&mut self, places: impl IntoIterator<Item = (usize, u64)>) {
        let own = self.tensors.iter_mut().flat_map(TensorPlan::places_mut);
        for ((file, offset), (in_file, at)) in own.zip(places) {
            (*file, *offset) = (in_file, at);
        }
    }

    /// Whether it can be carried out, by force or without.
    ///
    /// # Errors
    /// `Misuse` with the obstacle.
    pub fn check_feasible(&self, force: bool) -> Result<()> {
        match &self.obstacle {
            Some(o) if !(force && o.yields) => Err(Error::misuse(o.message.clone()).hint(o.hint.clone())),
            _ => Ok(()),
        }
    }

    /// Bytes of all output files.
    pub fn total_len(&self) -> u64 {
        self.files.iter().map(|f| f.len).sum()
    }

    /// Bytes that are written, and read again for checksums.
    pub fn work(&self) -> u64 {
        let of_tensors = self.tensors.iter().map(|t| t.nbytes);
        of_tensors.chain(self.files.iter().filter_map(|f| f.ending.as_ref().map(Ending::bytes))).sum()
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|t| t.source.elements()).sum()
    }

    /// Bits for each weight, metadata not counted.
    pub fn bits_per_weight(&self) -> f64 {
        let bytes: u64 = self.tensors.iter().map(|t| t.nbytes).sum();
        bytes as f64 * 8.0 / (self.parameters().max(1)) as f64
    }

    /// A note for each pair of wanted and given type.
    pub fn note_fallbacks(&mut self) {
        let mut pairs: indexmap::IndexMap<(DType, DType), Vec<&str>> = indexmap::IndexMap::new();
        for t in &self.tensors {
            if let Some(wanted) = t.wanted {
                pairs.entry((wanted, t.dtype)).or_default().push(&t.name);
            }
        }
        for ((wanted, given), names) in pairs {
            self.notes.push(format!(
                "{} of {} tensors are {given}, since their rows do not fill blocks of {} ({wanted}): {}{}",
                names.len(),
                self.tensors.len(),
                wanted.block_size(),
                names[..names.len().min(3)].join(", "),
                if names.len() > 3 { ", ..." } else { "" },
            ));
        }
    }
}
