//! The manifest: what a file holds, in the order in which it lies there.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::encoding::{Encoding, PartSize};
use super::fields::Fields;
use super::frame::{ALIGNMENT, HEADER};
use super::json::{self, Kept, MAX_NUMBER};
use super::planes;
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};
use crate::sha256::hex;

/// What of a manifest is read item by item.
const LISTS: [&str; 2] = ["files", "tensors"];
/// Most bytes of a tensor's name.
const MAX_NAME: usize = 1024;
/// Most dimensions.
const MAX_DIMS: usize = 8;
/// Most parts of a tensor.
const MAX_PARTS: usize = 64;
/// Most bytes of a part of a path.
const MAX_COMPONENT: usize = 255;

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifest {
    /// Other files of the model, byte for byte; they lie before the tensors.
    pub files: Vec<SideFile>,
    /// The tensors.
    pub tensors: Vec<Tensor>,
    /// Where they come from.
    pub provenance: Map<String, Json>,
    /// Which part of a model in several files it is.
    pub split: Option<Split>,
    /// What a later version has put beside.
    pub more: Kept,
}

/// A file that is stored as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct SideFile {
    /// Its path relative to the model's directory, with `/`.
    pub name: String,
    /// Its bytes.
    pub segment: Segment,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name, unique in the model.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// What it is in a model, as qconv's definitions of architectures call it.
    pub role: Option<String>,
    /// How its values are stored.
    pub encoding: Encoding,
    /// Those the encoding has, in its order; then those that are kept for the source's sake.
    pub parts: Vec<Part>,
    /// The tensors that it was made from, and becomes again.
    pub origin: Option<Kept>,
    /// What a later version has put beside.
    pub more: Kept,
}

/// A part of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name, unique in the tensor.
    pub name: String,
    /// Its bytes.
    pub segment: Segment,
}

/// A run of bytes in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// How many.
    pub bytes: u64,
    /// Their SHA-256.
    pub sha256: [u8; 32],
    /// What they stand for, where they are compressed.
    pub compression: Option<Compression>,
}

/// How bytes stand for others.
#[derive(Clone, Debug, PartialEq)]
pub struct Compression {
    /// The method.
    pub kind: String,
    /// How many bytes there are without.
    pub bytes: u64,
    /// Their SHA-256.
    pub sha256: [u8; 32],
    /// What the method has to know.
    pub more: Kept,
}

/// Which part of a model a file is.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// Its number, from 1.
    pub no: u64,
    /// How many there are.
    pub count: u64,
    /// In the last file: length, and SHA-256 of the manifest, of each of the others.
    pub seals: Vec<ShardSeal>,
}

/// What identifies another file of a split model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ShardSeal {
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of its manifest.
    pub manifest: [u8; 32],
}

impl Segment {
    /// Bytes whose SHA-256 is not known yet.
    pub fn plain(bytes: u64) -> Self {
        Self { bytes, sha256: [0; 32], compression: None }
    }

    /// Bytes without compression.
    pub fn content_bytes(&self) -> u64 {
        self.compression.as_ref().map_or(self.bytes, |c| c.bytes)
    }

    fn parse(fields: &mut Fields<'_>) -> Result<Self> {
        let compression = match fields.optional("compression") {
            None => None,
            Some(value) => {
                let mut inner = Fields::of(value, "compression")?;
                Some(Compression {
                    kind: inner.text("kind")?.to_string(),
                    bytes: inner.number("bytes", 0..=MAX_NUMBER)?,
                    sha256: inner.sha256("sha256")?,
                    more: inner.rest(),
                })
            }
        };
        Ok(Self {
            bytes: fields.number("bytes", 0..=MAX_NUMBER)?,
            sha256: fields.sha256("sha256")?,
            compression,
        })
    }

    fn json(&self, name: &str) -> Json {
        let mut map = Map::new();
        map.insert("name".into(), json!(name));
        map.insert("bytes".into(), json!(self.bytes));
        map.insert("sha256".into(), json!(hex(&self.sha256)));
        if let Some(c) = &self.compression {
            let mut inner = c.more.fields();
            inner.insert("kind".into(), json!(c.kind));
            inner.insert("bytes".into(), json!(c.bytes));
            inner.insert("sha256".into(), json!(hex(&c.sha256)));
            map.insert("compression".into(), inner.into());
        }
        Json::Object(map)
    }
}

impl Manifest {
    /// The manifest in `bytes`.
    ///
    /// # Errors
    /// `Malformed` for what is no such manifest, or contradicts itself; `Limit`.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self> {
        let (mut files, mut tensors) = (Vec::new(), Vec::new());
        let mut item = |list: usize, value: &Json| {
            match LISTS[list] {
                "files" => files.push(SideFile::parse(value)?),
                _ => tensors.push(Tensor::parse(value)?),
            }
            let n = files.len().max(tensors.len()) as u64;
            match n <= limits.tensors {
                true => Ok(()),
                false => Err(Bound::Tensors
                    .reached(format!("more {} than the {} allowed", LISTS[list], limits.tensors))),
            }
        };
        let mut rest = json::parse_lists(bytes, &LISTS, &mut item)?;
        let Some(Json::Object(provenance)) = rest.shift_remove("provenance") else {
            return Err(Error::malformed("manifest has no provenance, or one that is no object"));
        };
        let split = rest.shift_remove("split").as_ref().map(Split::parse).transpose()?;
        let manifest = Self { files, tensors, provenance, split, more: rest.into() };
        manifest.check()?;
        Ok(manifest)
    }

    /// Its bytes.
    ///
    /// # Errors
    /// `Malformed` for what a reader would refuse, `Unsupported` for what JSON has no canonical text for.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut map = self.more.fields();
        map.insert("files".into(), self.files.iter().map(|f| f.segment.json(&f.name)).collect());
        map.insert("tensors".into(), self.tensors.iter().map(Tensor::json).collect());
        map.insert("provenance".into(), self.provenance.clone().into());
        if let Some(split) = &self.split {
            map.insert("split".into(), split.json());
        }
        json::write(&map.into())
    }

    /// All segments in the order of the file.
    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        let of_tensors = self.tensors.iter().flat_map(|t| t.parts.iter().map(|p| &p.segment));
        self.files.iter().map(|f| &f.segment).chain(of_tensors)
    }

    /// Puts others in the place of all segments, in the order of the file.
    pub fn set_segments(&mut self, segments: Vec<Segment>) {
        self.segments_mut().zip(segments).for_each(|(to, from)| *to = from);
    }

    pub(super) fn segments_mut(&mut self) -> impl Iterator<Item = &mut Segment> {
        let of_tensors = self.tensors.iter_mut().flat_map(|t| t.parts.iter_mut().map(|p| &mut p.segment));
        self.files.iter_mut().map(|f| &mut f.segment).chain(of_tensors)
    }

    /// Where each segment begins, and at last the manifest.
    ///
    /// # Errors
    /// `Malformed` beyond 2^63.
    pub fn places(&self) -> Result<Vec<u64>> {
        let mut places = vec![HEADER];
        let mut at = HEADER;
        for segment in self.segments() {
            let end = at.checked_add(segment.bytes).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
            at = end
                .filter(|end| *end <= i64::MAX as u64)
                .ok_or_else(|| Error::malformed("its segments would exceed 2^63 bytes"))?;
            places.push(at);
        }
        Ok(places)
    }

    /// What a reader refuses.
    fn check(&self) -> Result<()> {
        let mut names = HashSet::new();
        for file in &self.files {
            check_path(&file.name)?;
            if !names.insert(file.name.to_ascii_lowercase()) {
                return Err(Error::malformed(format!("file {:?} is there twice", file.name)));
            }
        }
        let mut names = HashSet::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            tensor.check().map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)))?;
            if !names.insert(tensor.name.as_str()) {
                return Err(Error::malformed(format!("tensor {:?} appears twice", tensor.name)));
            }
        }
        if let Some(split) = &self.split {
            split.check()?;
            if split.no > 1 && !self.files.is_empty() {
                return Err(Error::malformed("a file that is not the first of its set has side files"));
            }
        }
        self.places().map(drop)
    }
}

impl SideFile {
    /// That these can be in memory together, as they are where models are converted.
    ///
    /// # Errors
    /// `Limit`.
    pub fn check_sum<'a>(files: impl IntoIterator<Item = &'a Self>, limits: &Limits) -> Result<()> {
        let lengths = files.into_iter().map(|f| f.segment.content_bytes());
        let sum = lengths.fold(0, u64::saturating_add);
        match sum <= limits.side_file_bytes {
            true => Ok(()),
            false => Err(Bound::SideFile.reached(format!(
                "the files beside its tensors have {sum} bytes together, at most {} are allowed",
                limits.side_file_bytes
            ))),
        }
    }

    fn parse(value: &Json) -> Result<Self> {
        let mut fields = Fields::of(value, "a file")?;
        let name = fields.text("name")?.to_string();
        let segment = Segment::parse(&mut fields).map_err(|e| e.context(format_args!("file {name:?}")))?;
        Ok(Self { name, segment })
    }
}

impl Tensor {
    /// A tensor of one's own making, without the SHA-256 of its parts. Those whose length varies have the
    /// largest.
    ///
    /// # Errors
    /// `Malformed` where such a tensor cannot be so encoded; `Misuse` for an encoding that is not known.
    pub fn new(name: impl Into<String>, shape: Vec<u64>, encoding: Encoding) -> Result<Self> {
        let sizes = encoding.parts(&shape)?.ok_or_else(|| Error::misuse("an encoding that is not known"))?;
        let part = |size: PartSize| {
            let bytes = size.dtype.nbytes(&size.shape)?;
            Ok(Part { name: size.name.to_string(), segment: Segment::plain(bytes) })
        };
        let parts = sizes.into_iter().map(part).collect::<Result<_>>()?;
        let name = name.into();
        Ok(Self { name, shape, role: None, encoding, parts, origin: None, more: Kept::default() })
    }

    /// Whether a part is compressed in a way that is not known.
    pub fn is_closed(&self) -> bool {
        self.unknown_compression().is_some()
    }

    fn unknown_compression(&self) -> Option<&str> {
        let kinds = self.parts.iter().filter_map(|p| p.segment.compression.as_ref()).map(|c| c.kind.as_str());
        kinds.into_iter().find(|kind| *kind != planes::KIND)
    }

    /// That its values can be read.
    ///
    /// # Errors
    /// `Unsupported` for an encoding or a compression that is not known.
    pub fn check_readable(&self) -> Result<()> {
        let unknown = match &self.encoding {
            Encoding::Unknown(_) => Some(("encoding", self.encoding.kind())),
            _ => self.unknown_compression().map(|kind| ("compression", kind)),
        };
        unknown.map_or(Ok(()), |(what, kind)| {
            Err(Error::unsupported(format!("its {what} {kind:?} is not known: its values cannot be read"))
                .hint("a newer qconv may read it; its bytes can be verified and copied"))
        })
    }

    fn parse(value: &Json) -> Result<Self> {
        let mut fields = Fields::of(value, "a tensor")?;
        let name = fields.text("name")?;
        Self::fields(name, &mut fields).map_err(|e| e.context(format_args!("tensor {name:?}")))
    }

    fn fields(name: &str, fields: &mut Fields<'_>) -> Result<Self> {
        let role = fields.optional("role");
        let role = role.map(|v| v.as_str().map(String::from).ok_or_else(|| fields.wrong("role", v)));
        let parts = fields.list("parts")?;
        if parts.len() > MAX_PARTS {
            return Err(Error::limit(format!("{} parts, at most {MAX_PARTS} are allowed", parts.len())));
        }
        let part = |value: &Json| {
            let mut fields = Fields::of(value, "a part")?;
            let name = fields.text("name")?.to_string();
            let segment =
                Segment::parse(&mut fields).map_err(|e| e.context(format_args!("part {name:?}")))?;
            Ok(Part { name, segment })
        };
        Ok(Self {
            name: name.to_string(),
            shape: fields.numbers("shape")?,
            role: role.transpose()?,
            encoding: Encoding::parse(fields.required("encoding")?)?,
            parts: parts.iter().map(part).collect::<Result<_>>()?,
            origin: fields.optional("origin").map(Kept::from),
            more: fields.rest(),
        })
    }

    fn json(&self) -> Json {
        let mut map = self.more.fields();
        map.insert("name".into(), json!(self.name));
        map.insert("shape".into(), json!(self.shape));
        map.insert("encoding".into(), self.encoding.json());
        map.insert("parts".into(), self.parts.iter().map(|p| p.segment.json(&p.name)).collect());
        if let Some(role) = &self.role {
            map.insert("role".into(), json!(role));
        }
        if let Some(origin) = &self.origin {
            map.insert("origin".into(), origin.value());
        }
        map.into()
    }

    /// Name, shape, and that the parts are those of the encoding.
    fn check(&self) -> Result<()> {
        check_name(&self.name, MAX_NAME)?;
        if self.shape.len() > MAX_DIMS {
            return Err(Error::limit(format!("{} dimensions, at most {MAX_DIMS} are", self.shape.len())));
        }
        crate::tensor::elements(&self.shape)?;
        for (k, part) in self.parts.iter().enumerate() {
            check_name(&part.name, MAX_COMPONENT)?;
            // There are few.
            if self.parts[..k].iter().any(|p| p.name == part.name) {
                return Err(Error::malformed(format!("part {:?} is there twice", part.name)));
            }
        }
        let Some(sizes) = self.encoding.parts(&self.shape)? else { return Ok(()) };
        let mut parts = self.parts.iter();
        for size in &sizes {
            let part = parts.next().filter(|p| p.name == size.name).ok_or_else(|| {
                Error::malformed(format!("its part {:?} is missing, or not in its place", size.name))
            })?;
            let (found, bytes) = (part.segment.content_bytes(), size.dtype.nbytes(&size.shape)?);
            if found > bytes || found < bytes && !size.varies {
                return Err(Error::malformed(format!(
                    "its part {:?} has {found} bytes, {} of shape {:?} has {bytes}",
                    size.name, size.dtype, size.shape
                )));
            }
        }
        // A plain tensor is what its source was.
        let may_keep = !matches!(self.encoding, Encoding::Plain(_));
        match parts.find(|p| !may_keep || !p.name.starts_with(KEPT)) {
            None => Ok(()),
            Some(p) => Err(Error::malformed(format!("{:?} has no part {:?}", self.encoding.kind(), p.name))),
        }
    }
}

/// How the names of parts begin that are kept for the source's sake.
const KEPT: &str = "kept.";

impl Split {
    fn parse(value: &Json) -> Result<Self> {
        let mut fields = Fields::of(value, "split")?;
        let seal = |value: &Json| {
            let mut fields = Fields::of(value, "a file of split")?;
            let bytes = fields.number("bytes", 0..=MAX_NUMBER)?;
            Ok(ShardSeal { bytes, manifest: fields.sha256("manifest")? })
        };
        let seals = match fields.optional("files") {
            None => Vec::new(),
            Some(_) => fields.list("files")?.iter().map(seal).collect::<Result<_>>()?,
        };
        Ok(Self { no: fields.number("no", 1..=99_999)?, count: fields.number("count", 2..=99_999)?, seals })
    }

    fn json(&self) -> Json {
        let mut map = Map::new();
        map.insert("no".into(), json!(self.no));
        map.insert("count".into(), json!(self.count));
        if !self.seals.is_empty() {
            let seal = |s: &ShardSeal| json!({"bytes": s.bytes, "manifest": hex(&s.manifest)});
            map.insert("files".into(), self.seals.iter().map(seal).collect());
        }
        map.into()
    }

    fn check(&self) -> Result<()> {
        let others = if self.no == self.count { self.count - 1 } else { 0 };
        if self.no > self.count || self.seals.len() as u64 != others {
            return Err(Error::malformed(format!(
                "file {} of {} names {} others",
                self.no,
                self.count,
                self.seals.len()
            )));
        }
        Ok(())
    }
}

/// A name that can be shown on one line.
fn check_name(name: &str, most: usize) -> Result<()> {
    if name.is_empty() || name.len() > most || name.chars().any(char::is_control) {
        return Err(Error::malformed(format!(
            "the name {name:?} is empty, too long, or has control characters"
        )));
    }
    Ok(())
}

/// Whether a file of a model can be called so: a path that stays below its directory, on any system.
pub fn is_path(path: &str) -> bool {
    check_path(path).is_ok()
}

/// A path that stays below the directory it is put into, on any system.
fn check_path(path: &str) -> Result<()> {
    check_name(path, MAX_NAME)?;
    let is_plain = |part: &str| {
        !part.is_empty()
            && part.len() <= MAX_COMPONENT
            && !part.ends_with(['.', ' '])
            && !part.contains(['\\', ':', '*', '?', '"', '<', '>', '|'])
    };
    match path.split('/').all(is_plain) {
        true => Ok(()),
        false => Err(Error::malformed(format!(
            "file {path:?} is no plain path of a file in the model's directory"
        ))),
    }
}
