//! That the packages of a model come in its order: what `chunks.json` says of their layers is what they hold.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use crate::container::coreml::chunks::CHUNKS;
use crate::container::coreml::mil::Operation;
use crate::container::coreml::{Package, package};
use crate::container::side::{from_json, read_side_file};
use crate::error::{Error, Result};
use crate::limits::Limits;

#[derive(Deserialize)]
struct Chunks {
    packages: Vec<Chunk>,
}

/// What is said of a package: from which layer on, and before which.
#[derive(Deserialize)]
struct Chunk {
    layers: Option<[u64; 2]>,
}

/// Looks at packages in the order in which they are called. Nothing is said of a single one.
///
/// # Errors
/// `Malformed` for layers that are elsewhere, or come in another order; `Io`.
pub(super) fn check(path: &Path, packages: &[Arc<Package>], limits: &Limits) -> Result<()> {
    let at = path.join(CHUNKS);
    if package::is_package(path) {
        return Ok(());
    }
    let Some(bytes) = read_side_file(&at, limits.side_file_bytes)? else { return Ok(()) };
    let said: Chunks = from_json(&bytes, &at)?;
    let mut last = None;
    for (chunk, package) in said.packages.iter().zip(packages) {
        let held = layers(package);
        let name = package.path().file_name().unwrap_or_default().to_string_lossy();
        let fault = |what: String| Error::malformed(format!("the package {name:?} {what}")).at(&at);
        if let Some([start, end]) = chunk.layers
            && (held.first() != Some(&start) || held.last().map(|n| n.saturating_add(1)) != Some(end))
        {
            let held: Vec<u64> = held.into_iter().take(8).collect();
            return Err(fault(format!(
                "is said to hold the layers {start}..{end}, it has weights of {held:?}"
            )));
        }
        if chunk.layers.is_none() && packages.len() > 1 && !held.is_empty() && said_of_others(&said) {
            return Err(fault("is said to hold no layers, and has weights of some".into()));
        }
        if let (Some(before), Some(first)) = (last, held.first())
            && before >= *first
        {
            return Err(fault(format!("begins with layer {first}, behind one that has layer {before}")));
        }
        last = held.last().copied().or(last);
    }
    Ok(())
}

fn said_of_others(said: &Chunks) -> bool {
    said.packages.iter().any(|chunk| chunk.layers.is_some())
}

/// The layers that a package has weights of, by the names of its values: `blk_3_attn_q_weight`.
fn layers(package: &Package) -> BTreeSet<u64> {
    let functions = package.model().program.functions.values();
    let blocks = functions.filter_map(|f| f.block_specializations.get(&f.opset));
    let is_constant = |o: &&Operation| o.kind == "const" || o.kind.starts_with("constexpr_");
    let constants = blocks.flat_map(|block| &block.operations).filter(is_constant);
    let names = constants.flat_map(|operation| &operation.outputs).map(|output| output.name.as_str());
    names.filter_map(|name| name.strip_prefix("blk_")?.split_once('_')?.0.parse().ok()).collect()
}
