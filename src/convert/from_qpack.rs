//! `.qpack` -> what it was made from: a Hugging Face directory, or a GGUF file. Nothing is decoded or rounded.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::Job;
use super::gather::{Source, identity};
use super::moved::Moved;
use super::plan::{FilePlan, Plan, TensorPlan};
use super::shards::{Sharding, lay_out as lay_out_gguf};
use crate::container::gguf::Gguf;
use crate::container::qpack::{Encoding, HEADERS, METADATA, Origin, Qpack, Tensor};
use crate::container::shards::{FileLayout, Layout};
use crate::container::{Store, safetensors};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::packed::qpack::join;
use crate::tensor::DType;

/// A `.qpack` that becomes again what it was made from.
#[derive(Clone, Debug)]
pub struct FromQpack {
    /// The file; of a set any.
    pub source: PathBuf,
    /// The directory to write, or the GGUF file; default: beside the source, called after it.
    pub output: Option<PathBuf>,
    /// Largest weights file, in bytes, where the source did not come from safetensors.
    pub max_shard_size: u64,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl FromQpack {
    /// A source, and nothing else said.
    pub fn new(source: impl Into<PathBuf>) -> Self {
        Self { source: source.into(), output: None, max_shard_size: 5 << 30, limits: Limits::default() }
    }

    /// A tensor that is in no form but that of `.qpack`, since qconv quantized it there; `None` where all come
    /// back as they were.
    ///
    /// # Errors
    /// As [`Qpack::open`].
    pub fn own_encoding(&self) -> Result<Option<String>> {
        let model = Qpack::open(&self.source, &self.limits)?;
        let own = model.tensors().find(|t| is_own(t)).map(|t| t.name.clone());
        Ok(own)
    }

    /// Opens and plans.
    ///
    /// # Errors
    /// As [`Qpack::open`]; `Unsupported` for tensors that are in no form but that of `.qpack`.
    pub fn plan(&self) -> Result<Job> {
        let model = Qpack::open(&self.source, &self.limits)?;
        let at = |e: Error| e.at(&self.source);
        let side: Vec<_> = model.read_files(|_| true, &self.limits)?.collect::<Result<_>>()?;
        if let Some(t) = model.tensors().find(|t| is_own(t)) {
            let what = format!("tensor {:?} is encoded as {}", t.name, t.encoding.kind());
            return Err(at(Error::unsupported(format!("{what}, which no checkpoint holds as it is"))
                .hint("--to FORMAT stores its weights in another format")));
        }
        let (parts, tensors) = model.into_parts().map_err(at)?;
        let store = join(parts, &tensors).map_err(at)?;
        let mut plan = Plan::new(Vec::with_capacity(tensors.len()));
        for tensor in tensors {
            plan.tensors.push(planned(tensor, &store).map_err(at)?);
        }
        let name = super::to_qpack::stem(&self.source);
        match side.iter().position(|(name, _)| name == METADATA) {
            Some(k) => self.gguf(plan, store, &name, &side[k].1),
            None => self.checkpoint(plan, store, &name, side),
        }
    }

    fn gguf(&self, mut plan: Plan, store: Store, name: &str, header: &[u8]) -> Result<Job> {
        let mut metadata =
            Gguf::metadata_of_bytes(self.source.join(METADATA), header.to_vec(), &self.limits)?;
        let output = self.output_at(&format!("{name}.gguf"));
        lay_out_gguf(&mut plan, &mut metadata, &Sharding::Whole, &output)?;
        Ok(Job { vouched: Some(self.source.clone()), ..Job::gguf(plan, store, &output) })
    }

    fn checkpoint(
        &self,
        mut plan: Plan,
        store: Store,
        name: &str,
        side: Vec<(String, Vec<u8>)>,
    ) -> Result<Job> {
        let output = match &self.output {
            Some(output) => output.clone(),
            None => self.source.with_file_name(name),
        };
        let (headers, mut side): (Vec<_>, Vec<_>) =
            side.into_iter().partition(|(name, _)| name.starts_with(HEADERS));
        let infos: Vec<(&str, DType, &[u64])> = plan.tensors.iter().flat_map(TensorPlan::written).collect();
        let layout = match as_it_was(headers, &infos, &self.limits)? {
            Some(layout) => layout,
            None => {
                plan.notes
                    .push("the weights were in other files than these: safetensors hold them now".into());
                side.retain(|(name, _)| !name.ends_with(".safetensors.index.json"));
                safetensors::write::layout(&infos, self.max_shard_size)?
            }
        };
        plan.place(layout.places);
        plan.files = layout.files.into_iter().map(FilePlan::from).collect();
        plan.files.extend(layout.index.map(|(name, bytes)| FilePlan::whole(name, bytes)));
        let lower = |name: &str| name.to_ascii_lowercase();
        let mut taken: HashSet<String> =
            plan.files.iter().map(|f| lower(&f.name.to_string_lossy())).collect();
        for (name, bytes) in side {
            if !taken.insert(lower(&name)) {
                let why = format!("file {name:?} has the name of another that is written");
                return Err(Error::malformed(why).at(&self.source));
            }
            plan.files.push(FilePlan::whole(name, bytes));
        }
        Ok(Job { vouched: Some(self.source.clone()), ..Job::directory(plan, store, output) })
    }

    fn output_at(&self, name: &str) -> PathBuf {
        match &self.output {
            Some(output) if output.is_dir() => output.join(name),
            Some(output) => output.clone(),
            None => self.source.with_file_name(name),
        }
    }
}

/// Whether a tensor was quantized for `.qpack`.
fn is_own(t: &Tensor) -> bool {
    t.origin.is_none() && !matches!(t.encoding, Encoding::Plain(_))
}

fn planned(tensor: Tensor, store: &Store) -> Result<TensorPlan> {
    let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
    if let Some(origin) = Origin::of(&tensor)? {
        return TensorPlan::moved(name, shape, Moved::restored(tensor, origin));
    }
    let info = store.get(&name).ok_or_else(|| {
        Error::unsupported(format!("tensor {name:?} is compressed in a way that is not known"))
    })?;
    let source = Source::new(&identity(std::slice::from_ref(info)).remove(0), store)?;
    TensorPlan::new(name, shape, info.dtype, None, source)
}

/// The safetensors files of these headers; `None` where there are none, or they are not of these tensors.
///
/// # Errors
/// `Malformed` for headers that are none.
fn as_it_was(
    headers: Vec<(String, Vec<u8>)>,
    tensors: &[(&str, DType, &[u64])],
    limits: &Limits,
) -> Result<Option<Layout>> {
    let mut places = HashMap::new();
    let mut files = Vec::with_capacity(headers.len());
    for (number, (name, header)) in headers.into_iter().enumerate() {
        let name = name.strip_prefix(HEADERS).unwrap_or(&name).to_string();
        let parsed = safetensors::parse_header(header.clone(), number, limits);
        let (infos, len) = parsed.map_err(|e| e.context(&name))?;
        if !name.ends_with(".safetensors") {
            return Err(Error::malformed(format!("{name:?} is no name of a safetensors file")));
        }
        for t in infos {
            if let Some(t) = places.insert(t.name.clone(), t) {
                return Err(Error::malformed(format!("tensor {:?} is in the headers of two files", t.name)));
            }
        }
        files.push(FileLayout { name, header, len, ending: None });
    }
    let place = |(name, dtype, shape): &(&str, DType, &[u64])| {
        let found = places.get(*name).filter(|t| t.dtype == *dtype && t.shape == *shape)?;
        Some((found.file, found.offset))
    };
    let mut names = HashSet::new();
    if let Some((name, ..)) = tensors.iter().find(|(name, ..)| !names.insert(*name)) {
        return Err(Error::malformed(format!("tensor {name:?} is made of two")));
    }
    let found: Option<Vec<_>> = tensors.iter().map(place).collect();
    let all = |places: &Vec<_>| !files.is_empty() && places.len() == tensors.len();
    let is_same = tensors.len() == places.len();
    Ok(found.filter(|f| is_same && all(f)).map(|places| Layout { files, places, index: None }))
}
