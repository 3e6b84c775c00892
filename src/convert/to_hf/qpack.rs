//! A model whose matrices are quantized for `.qpack`, into one such file.

use serde_json::{Map, Value as Json, json};

use super::model::HfModel;
use super::{ToHf, pretty};
use crate::container::moments::Moments;
use crate::container::qpack::{CONFIG, Encoding, Tensor};
use crate::convert::plan::{Plan, TensorPlan};
use crate::convert::to_qpack::{Contents, Provenance, lay_out, role};
use crate::convert::{Job, Way};
use crate::error::{Error, Result};
use crate::packed::write::{Format, QpackEncoding, Target};

impl ToHf {
    /// Lays out the file.
    ///
    /// # Errors
    /// `Unsupported` for layouts that `.qpack` has no encoding for; as [`lay_out`].
    pub(super) fn qpack(
        &self,
        mut plan: Plan,
        model: HfModel,
        target: Option<&Target>,
        output: &std::path::Path,
    ) -> Result<Job> {
        let HfModel { store, config, mut side, places, .. } = model;
        let tensors = plan.tensors.iter().map(|t| {
            let mut tensor = encoded(t).map_err(|e| e.context(format!("tensor {:?}", t.name)))?;
            tensor.role = places.get(&t.name).map(|(name, _)| role(name));
            Ok(tensor)
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        side.push((CONFIG.to_string(), pretty(&config)));
        let provenance = self.provenance(target)?;
        let contents = Contents { tensors, side, provenance };
        lay_out(&mut plan, contents, &store, output, self.max_shard_size, &self.limits)?;
        Job::gguf(plan, store, output).vouching(&self.source)
    }

    /// How weights became codes.
    fn provenance(&self, target: Option<&Target>) -> Result<Provenance> {
        let mut known = Map::new();
        let Some(target) = target else { return Ok(Provenance::New(known, None)) };
        let mut options = Map::new();
        if let Format::Qpack(encoding) = target.format {
            options.insert("encoding".into(), json!(encoding.name()));
            if encoding == QpackEncoding::Integers {
                options.insert("bits".into(), json!(target.bits));
                options.insert("symmetric".into(), json!(target.symmetric));
            }
        }
        if target.format.has_groups() {
            let group_size = target.group_size.map_or(json!("row"), |n| json!(n));
            options.insert("group_size".into(), group_size);
        }
        if !self.ignore.is_empty() {
            let ignore: Vec<&str> = self.ignore.iter().map(regex::Regex::as_str).collect();
            options.insert("ignore".into(), json!(ignore));
        }
        let method = self.method.as_ref();
        let others = method.and_then(|m| m.others).map(Way::name);
        let others = others.or(self.imatrix.as_ref().map(|_| "imatrix")).unwrap_or("rtn");
        known.insert("method".into(), json!(others));
        let by_tensor: Vec<Json> = method
            .iter()
            .flat_map(|m| &m.by_tensor)
            .map(|(pattern, way)| json!({"tensors": pattern.as_str(), "method": way.name()}))
            .collect();
        if !by_tensor.is_empty() {
            options.insert("tensor_methods".into(), by_tensor.into());
        }
        known.insert("options".into(), options.into());
        let moments = method.and_then(|m| m.moments.clone());
        if let Some(path) = &moments {
            let moments = Moments::open(path, &self.limits)?;
            let text =
                |t: &crate::container::moments::Text| json!({"name": t.name, "tokens_sha256": t.tokens});
            let texts: Vec<Json> = moments.contents().texts.iter().map(text).collect();
            known.insert("calibration".into(), json!({"texts": texts}));
        }
        let calibration = moments.or(self.imatrix.as_ref().map(|i| i.path.clone()));
        Ok(Provenance::New(known, calibration))
    }
}

/// A planned tensor as the manifest has it.
fn encoded(t: &TensorPlan) -> Result<Tensor> {
    let encoding = match &t.packing {
        None => Encoding::Plain(t.dtype),
        Some(packing) => {
            let (cols, _) = t.rows();
            let encoding = packing.layout.encoding(t.source.elements() / cols, cols);
            encoding
                .ok_or_else(|| Error::unsupported(format!("{} is no encoding of .qpack", packing.format)))?
        }
    };
    let mut tensor = Tensor::new(&t.name, t.shape.clone(), encoding)?;
    for (own, part) in tensor.parts.iter_mut().zip(t.parts().unwrap_or_default()) {
        // Some depend on codes.
        own.segment.bytes = part.dtype.nbytes(&part.shape)?;
    }
    Ok(tensor)
}
