//! Any source -> Hugging Face directory, quantized or not.

mod coreml;
mod gguf;
mod matrices;
mod model;
mod qpack;
mod rounding;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::Value as Json;

pub(super) use self::gguf::{Wish as GgufWish, recognise as recognise_gguf};
use self::model::HfModel;
pub(super) use self::rounding::places_of_checkpoint;
use self::rounding::{Need, Rounder};
use super::Job;
use super::checkpoint::is_conv1d;
use super::gather::{Scratch, Source};
use super::guide::MethodChoice;
use super::pack::Packing;
use super::plan::{FilePlan, Plan, TensorPlan};
use super::quantizer::ImatrixChoice;
use super::side_files::is_qpack_file;
use crate::arch::Mapped;
use crate::block::codec;
use crate::container::coreml::chunks;
use crate::container::gguf::is_gguf;
use crate::container::{Store, pytorch, safetensors};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::packed::write::{Format, Integers, Target};
use crate::tensor::DType;

/// Tensors up to this many elements are looked at to see whether the target type holds them.
const SMALL: u64 = 1 << 20;

/// What holds the weights of a Hugging Face directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HfContainer {
    /// safetensors.
    Safetensors,
    /// PyTorch's zip archives.
    Pytorch,
    /// One file, with all other files of the directory in it.
    Qpack,
}

/// A conversion to a Hugging Face directory.
#[derive(Clone, Debug)]
pub struct ToHf {
    /// A GGUF file (of a split one, any shard), a Hugging Face directory, or a Core ML package.
    pub source: PathBuf,
    /// The directory to write; default: beside the source, called after the model and the format.
    pub output: Option<PathBuf>,
    /// What holds the weights.
    pub container: HfContainer,
    /// How matrices are quantized; `None`: not at all.
    pub wanted: Option<Wanted>,
    /// How weights become integers, where it is not the next code.
    pub method: Option<MethodChoice>,
    /// The importance matrix for that.
    pub imatrix: Option<ImatrixChoice>,
    /// Type of the weights that are not quantized: F32, F16 or BF16; `None` takes the source's own, or
    /// what is customary in the format.
    pub dtype: Option<DType>,
    /// Modules that are not quantized, beside embeddings, head, norms and routers.
    pub ignore: Vec<Regex>,
    /// Largest weights file, in bytes.
    pub max_shard_size: u64,
    /// Whether it is found out what each tensor loses.
    pub measures: bool,
    /// Whether to refuse what loses something.
    pub exact_only: bool,
    /// A definition outside the program that is to be used instead.
    pub arch_file: Option<PathBuf>,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

/// A format of quantized checkpoints, and what was said of it. What was not, is as in the source, or
/// customary.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The format.
    pub format: Format,
    /// Bits of a code.
    pub bits: Option<u32>,
    /// Columns of a group; -1 for one group in a row.
    pub group_size: Option<i64>,
    /// Whether zero is the middle code everywhere.
    pub symmetric: Option<bool>,
    /// Whether config.json says that columns were rounded in the order of their activations.
    pub desc_act: bool,
    /// Whether GPTQ's zeros are stored as they are.
    pub second_version: Option<bool>,
    /// Whether the scales of bitsandbytes' 4 bits are quantized as well.
    pub double_quant: bool,
}

impl Wanted {
    /// A format, and nothing else said.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            bits: None,
            group_size: None,
            symmetric: None,
            desc_act: false,
            second_version: None,
            double_quant: false,
        }
    }

    /// The customary type of what is not quantized; `None`: the source's own.
    fn dtype(&self) -> Option<DType> {
        match self.format {
            // Scales are in F16, and loaders cast them to the type of the model.
            Format::Gptq | Format::Awq | Format::Compressed(_) => Some(DType::F16),
            // transformers computes the decoded weights in BF16.
            Format::Fp8 | Format::Mxfp4 => Some(DType::BF16),
            Format::BnbNf4 | Format::BnbFp4 | Format::BnbInt8 | Format::Qpack(_) => None,
        }
    }
}

impl ToHf {
    /// Everything as it mostly is.
    pub fn new(source: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            output: Some(output.into()),
            container: HfContainer::Safetensors,
            wanted: None,
            method: None,
            imatrix: None,
            dtype: None,
            ignore: Vec::new(),
            max_shard_size: 5 << 30,
            measures: false,
            exact_only: false,
            arch_file: None,
            limits: Limits::default(),
        }
    }

    /// Refuses a source that is no GGUF file.
    ///
    /// # Errors
    /// `Unsupported`, `Io`.
    pub fn check_gguf(&self) -> Result<()> {
        match self.source.is_dir() || !is_gguf(&self.source)? {
            true => Err(Error::unsupported("is no GGUF file").at(&self.source)),
            false => Ok(()),
        }
    }

    /// Refuses a source that is no Core ML package.
    ///
    /// # Errors
    /// `Unsupported`.
    pub fn check_coreml(&self) -> Result<()> {
        match chunks::is_model(&self.source) {
            true => Ok(()),
            false => {
                Err(Error::unsupported("is no Core ML package, and no directory of several").at(&self.source))
            }
        }
    }

    /// Opens, recognises, plans.
    ///
    /// # Errors
    /// What is no model, unknown architectures, tensors without a place; `Misuse` for what a format has
    /// not; `Unsupported` for matrices that it cannot hold.
    pub fn plan(&self) -> Result<Job> {
        if let Some(dtype) = self.dtype
            && !matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        {
            return Err(Error::misuse(format!("--dtype {dtype}: weights are written as f32, f16 or bf16")));
        }
        let mut model = self.open()?;
        let mut plan = Plan::new(Vec::with_capacity(model.mapped.len()));
        let mut integers = Vec::with_capacity(model.mapped.len());
        for m in std::mem::take(&mut model.mapped) {
            let source = Source::new(&m, &model.store)?;
            integers.push(matrices::integers(&m, &source, &model.store));
            let dtype = model.rest(&m, &source)?;
            if dtype == DType::F32
                && model.dtype != DType::F32
                && source.dtype() == Some(DType::F32)
                && !model.keeps_types
            {
                plan.notes
                    .push(format!("{} stays F32: {} would not hold its values exactly", m.name, model.dtype));
            }
            plan.tensors.push(TensorPlan::new(m.name, m.shape, dtype, None, source)?);
        }
        let target = match &self.wanted {
            Some(wanted) => Some(self.pack(wanted, &mut plan, integers, &mut model)?),
            None => None,
        };
        plan.notes.append(&mut model.notes);
        (plan.measures, plan.exact_only) = (self.measures || self.exact_only, self.exact_only);
        if self.exact_only {
            check_exact(&plan)?;
        }
        let output = match &self.output {
            Some(dir) if self.container == HfContainer::Qpack && dir.is_dir() => {
                dir.join(format!("{}.qpack", name(&model, target.as_ref())))
            }
            Some(output) => {
                check_apart(&self.source, output)?;
                output.clone()
            }
            None => {
                let ending = if self.container == HfContainer::Qpack { ".qpack" } else { "" };
                let name = name(&model, target.as_ref());
                beside(&self.source).with_file_name(format!("{name}{ending}"))
            }
        };
        if self.container == HfContainer::Qpack {
            return self.qpack(plan, model, target.as_ref(), &output);
        }
        lay_out(&mut plan, self.container, model.config, model.side, self.max_shard_size)?;
        Job::directory(plan, model.store, output).vouching(&self.source)
    }

    fn open(&self) -> Result<HfModel> {
        let wanted = self.wanted.as_ref();
        let customary = wanted.filter(|_| !self.exact_only).and_then(Wanted::dtype);
        let dtype = self.dtype.or(customary);
        let blocks = wanted.is_some_and(|w| matches!(w.format, Format::Mxfp4 | Format::Qpack(_)));
        if is_gguf_file(&self.source) {
            let quant_method = blocks.then_some(Format::Mxfp4.name());
            let arch_file = self.arch_file.as_deref();
            let wish = gguf::Wish { dtype, keeps_types: self.exact_only, quant_method, arch_file };
            return gguf::open(&self.source, &wish, &self.limits);
        }
        if chunks::is_model(&self.source) {
            return coreml::open(&self.source, dtype, self.arch_file.as_deref(), &self.limits);
        }
        if self.arch_file.is_some() {
            return Err(Error::misuse("--arch-file describes the way back from GGUF; this source is none")
                .at(&self.source));
        }
        let need = match self.method.is_some() || self.imatrix.is_some() {
            true => Need::Must,
            false if self.container == HfContainer::Qpack => Need::Gladly,
            false => Need::Not,
        };
        model::open(&self.source, dtype, blocks, need, &self.limits)
    }

    /// Packs the matrices that are wanted, and says so in the config.
    fn pack(
        &self,
        wanted: &Wanted,
        plan: &mut Plan,
        integers: Vec<Option<Integers>>,
        model: &mut HfModel,
    ) -> Result<Target> {
        let is_wanted = |t: &TensorPlan| matrices::is_wanted(wanted.format, &t.name, &t.shape, &self.ignore);
        let chosen: Vec<bool> = plan.tensors.iter().map(is_wanted).collect();
        let name = wanted.format.name();
        if !chosen.contains(&true) {
            return Err(Error::unsupported(format!("the model has no matrix to be stored in {name}")).hint(
                match wanted.format {
                    Format::Mxfp4 => "only stacks of experts are, as gpt-oss has them",
                    _ => "matrices of blocks are; perhaps --ignore matches all of them",
                },
            ));
        }
        if is_conv1d(&model.config) {
            return Err(Error::unsupported(format!(
                "the layers of this model are stored transposed (Conv1D), which {name} is not written for yet"
            )));
        }
        let of_chosen = integers.iter().zip(&chosen).filter(|(_, c)| **c).filter_map(|(i, _)| i.as_ref());
        let target = matrices::decide(wanted, of_chosen, &model.store)?;
        let sizes: Vec<[u64; 2]> = plan
            .tensors
            .iter()
            .zip(&chosen)
            .filter(|(_, chosen)| **chosen)
            .map(|(t, _)| [t.source.elements() / t.rows().0, t.rows().0])
            .collect();
        let computed = torch_name(model.dtype);
        let layout = target.layout(&sizes, computed)?;
        let places = model.places.clone();
        let (method, imatrix) = (self.method.as_ref(), self.imatrix.as_ref());
        let rounder = Rounder::open(wanted, method, imatrix, places, &self.limits)?;
        let mut kept: Vec<String> = Vec::new();
        for ((t, integers), chosen) in plan.tensors.iter_mut().zip(integers).zip(chosen) {
            if !chosen {
                let stack = t.name.ends_with("_blocks") && t.shape.len() == 3;
                if wanted.format == Format::Mxfp4 && stack {
                    let why =
                        format!("tensor {:?}: mxfp4 stores the experts of all layers, or of none", t.name);
                    return Err(Error::unsupported(why).hint("leave --ignore out"));
                }
                if matrices::is_kept(&t.name, &t.shape) {
                    kept.push(matrices::module(&t.name).to_string());
                }
                continue;
            }
            let context = |e: Error| e.context(format!("tensor {:?}", t.name));
            let packing = Packing::new(name, layout.clone(), &t.name, &t.shape);
            let mut packing = packing.map_err(|e| {
                context(e).hint(format!("--ignore '{}' leaves it as it is", matrices::module(&t.name)))
            })?;
            packing.settle(integers, &t.source, &model.store).map_err(context)?;
            if let (Some(rounder), None) = (&rounder, &packing.origin) {
                let found = rounder.rounding(t, &*layout).map_err(context)?;
                (t.rounding, packing.expert, t.fallback) = found;
            }
            (t.nbytes, t.dtype) = (packing.nbytes().map_err(context)?, DType::F32);
            t.packing = Some(Box::new(packing));
        }
        // Loaders replace the module of all experts of a block, unless it is named.
        let of_experts = |is_packed: bool| {
            let tensors = plan.tensors.iter().filter(move |t| t.packing.is_some() == is_packed);
            tensors.filter(|t| t.shape.len() > 1).filter_map(|t| matrices::experts(&t.name))
        };
        let packed: BTreeSet<&str> = of_experts(true).collect();
        let whole: BTreeSet<&str> = of_experts(false).filter(|module| !packed.contains(module)).collect();
        kept.extend(whole.iter().map(|module| module.to_string()));
        if !whole.is_empty() && wanted.format != Format::Mxfp4 {
            let n = whole.len();
            plan.notes.push(format!(
                "the experts of {n} blocks are not quantized (stacks of matrices, or --ignore)"
            ));
        }
        if wanted.format == Format::Mxfp4 {
            kept = MXFP4_KEPT.map(String::from).to_vec();
        } else if !kept.iter().any(|name| name == "lm_head") {
            // Tied to the embeddings, it has no tensor; loaders must leave it alone all the same.
            kept.push("lm_head".into());
        }
        let mut quantization = target.config(&kept, &sizes, computed)?.unwrap_or_default();
        let has_stacks = plan.tensors.iter().any(|t| t.name.ends_with("_blocks") && t.shape.len() == 3);
        if matches!(wanted.format, Format::Qpack(_)) && has_stacks {
            // By that definitions know what the stacks are called.
            let kept = MXFP4_KEPT.map(String::from);
            quantization = Target::new(Format::Mxfp4).config(&kept, &sizes, computed)?.unwrap_or_default();
        }
        if wanted.format == Format::Gptq {
            if kept.iter().any(|module| self.ignore.iter().any(|pattern| pattern.is_match(module))) {
                let quantized = plan.tensors.iter().filter(|t| t.packing.is_some());
                let quantized: Vec<_> = quantized.map(|t| matrices::module(&t.name)).collect();
                quantization["modules_in_block_to_quantize"] =
                    vec![matrices::in_blocks(&quantized, &kept)].into();
            }
            model.side.push(("quantize_config.json".into(), pretty(&quantization)));
        }
        if !quantization.is_null() {
            model.config["quantization_config"] = quantization;
        }
        let exact = plan.tensors.iter().filter(|t| t.packing.as_ref().is_some_and(|p| p.origin.is_some()));
        let (exact, all) = (exact.count(), sizes.len());
        plan.notes.push(describe(&target, exact, all));
        plan.notes.extend(rounder.iter().flat_map(|r| r.notes(&plan.tensors)));
        Ok(target)
    }
}

/// As gpt-oss is published.
const MXFP4_KEPT: [&str; 4] =
    ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];

fn describe(target: &Target, exact: usize, all: usize) -> String {
    let name = target.format.name();
    let grid = match target.group_size {
        _ if !target.format.has_grid() => String::new(),
        None => format!(", {} bits, a scale for each row", target.bits),
        Some(n) => format!(", {} bits in groups of {n}", target.bits),
    };
    let kind = match (target.format.has_grid(), target.symmetric) {
        (true, true) => ", symmetric",
        (true, false) => ", with zeros",
        _ => "",
    };
    let kept = match exact {
        0 => "rounded".to_string(),
        n if n == all => "with the codes and scales they have".to_string(),
        n => format!("{n} with the codes and scales they have, the others rounded"),
    };
    format!("{all} matrices in {name}{grid}{kind}: {kept}")
}

impl HfModel {
    /// The type of a tensor that is not packed.
    fn rest(&self, m: &Mapped, source: &Source) -> Result<DType> {
        let stored = source.dtype().unwrap_or(DType::F32);
        if stored.is_block() || self.store.get(&m.name).is_some_and(|t| self.store.is_joined(t)) {
            return Ok(self.dtype);
        }
        let is_float = matches!(stored, DType::F32 | DType::F16 | DType::BF16 | DType::F64);
        if !is_float || self.keeps_types {
            return Ok(stored);
        }
        Ok(if holds(m, source, &self.store, self.dtype)? { self.dtype } else { DType::F32 })
    }
}

/// Refuses integers that are not on the grid. Of other formats it shows when they are written.
fn check_exact(plan: &Plan) -> Result<()> {
    let rounded =
        |t: &&TensorPlan| t.packing.as_ref().is_some_and(|p| p.origin.is_none() && p.layout.grid().is_some());
    let mut lossy = plan.tensors.iter().filter(rounded);
    let Some(first) = lossy.next() else { return Ok(()) };
    Err(Error::misuse(format!(
        "--exact-only: {} matrices are not on the grid of {}, {:?} first",
        1 + lossy.count(),
        first.type_name(),
        first.name
    ))
    .hint("other --bits, --group-size, --sym or --asym may hold them; without --exact-only they are rounded"))
}

/// Refuses to write a checkpoint into its own directory.
fn check_apart(source: &Path, output: &Path) -> Result<()> {
    let same = |a: &Path| Some(a.canonicalize().ok()? == output.canonicalize().ok()?);
    match is_one_file(source) || same(directory(source)) != Some(true) {
        true => Ok(()),
        false => Err(Error::misuse("the output would overwrite its own input").at(output)),
    }
}

fn is_gguf_file(source: &Path) -> bool {
    source.is_file() && is_gguf(source).unwrap_or(false)
}

/// Whether a source is no file of a directory: a GGUF or a `.qpack` file.
fn is_one_file(source: &Path) -> bool {
    is_gguf_file(source) || is_qpack_file(source).unwrap_or(false)
}

/// The directory of a checkpoint of which a file may be given.
fn directory(source: &Path) -> &Path {
    match source.parent() {
        _ if !source.is_file() => source,
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The model's directory, or its only file, by a path that ends in a name.
fn beside(source: &Path) -> PathBuf {
    let place = if is_one_file(source) { source } else { directory(source) };
    match place.file_name() {
        Some(_) => place.to_path_buf(),
        None => place.canonicalize().unwrap_or_else(|_| place.to_path_buf()),
    }
}

/// `{model}-{method}-w4-g128`.
fn name(model: &HfModel, target: Option<&Target>) -> String {
    let stem = model.name.as_deref().unwrap_or("model");
    match target {
        None => format!("{stem}-{}", torch_name(model.dtype)),
        Some(t) if t.format.has_grid() => {
            let group = t.group_size.map_or_else(|| "channel".to_string(), |n| format!("g{n}"));
            format!("{stem}-{}-w{}-{group}", t.format.name(), t.bits)
        }
        Some(t) => format!("{stem}-{}", t.format.name()),
    }
}

/// PyTorch's name of a type.
fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        _ => "bfloat16",
    }
}

fn lay_out(
    plan: &mut Plan,
    container: HfContainer,
    config: Json,
    side: Vec<(String, Vec<u8>)>,
    max_shard_size: u64,
) -> Result<()> {
    let infos: Vec<_> = plan.tensors.iter().flat_map(TensorPlan::written).collect();
    let layout = match container {
        HfContainer::Safetensors => safetensors::write::layout(&infos, max_shard_size)?,
        HfContainer::Pytorch | HfContainer::Qpack => pytorch::write::layout(&infos, max_shard_size)?,
    };
    plan.place(layout.places);
    plan.files = layout.files.into_iter().map(FilePlan::from).collect();
    // Where nothing is known but tensors there is none.
    let config = (!config.is_null()).then(|| ("config.json".to_string(), pretty(&config)));
    let small = layout.index.into_iter().chain(config).chain(side);
    plan.files.extend(small.map(|(name, bytes)| FilePlan::whole(name, bytes)));
    Ok(())
}

/// Whether `dtype` holds a small F32 tensor without loss; of large ones it is taken as wanted.
fn holds(m: &Mapped, source: &Source, store: &Store, dtype: DType) -> Result<bool> {
    let n = source.elements();
    if dtype == DType::F32 || n > SMALL || source.dtype().is_some_and(|d| d != DType::F32) {
        return Ok(true);
    }
    let context = |e: Error| e.context(format!("tensor {:?}", m.name));
    let (mut values, mut scratch) = (Vec::new(), Scratch::default());
    source.values(store, 0, n, &mut values, &mut scratch).map_err(context)?;
    let codec = codec(dtype).ok_or_else(|| Error::unsupported(format!("{dtype} cannot be written")))?;
    let mut bytes = vec![0; dtype.bytes_for(n)? as usize];
    codec.encode(&values, values.len(), None, &mut bytes)?;
    let mut back = vec![0.0f32; values.len()];
    codec.decode(&bytes, &mut back)?;
    Ok(values.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()))
}

pub(super) fn pretty(value: &Json) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}
