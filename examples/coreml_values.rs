//! What a Core ML package decodes to and computes, for other programs to compare with (`tests/peers/coreml.py`):
//!
//! ```sh
//! cargo run --release --example coreml_values -- X.mlpackage DIR 1 15 8
//! ```
//!
//! writes into DIR `values.bin`, float32, and `index.json`, which says where in it the weights of each function are, and
//! the logits of these tokens.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use qconv::container::coreml::{Form, Package, constants};
use qconv::exec::{LanguageModel, Rounding, Session};
use qconv::limits::Limits;
use qconv::packed::coreml::Weight;
use serde_json::json;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(package), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: coreml_values X.mlpackage DIR [TOKEN]...".into());
    };
    let ids: Vec<i32> = arguments.map(|id| id.to_string_lossy().parse()).collect::<Result<_, _>>()?;
    fs::create_dir_all(&out)?;
    let limits = Limits::default();
    let opened = Arc::new(Package::open(&package, &limits)?);
    let (mut values, mut weights) = (Vec::new(), BTreeMap::new());
    for (name, function) in &opened.model().program.functions {
        let mut of_function = Vec::new();
        for constant in constants(&opened, function)? {
            let is_part = matches!(constant.form, Form::SparseLut { .. } | Form::SparseBlockwise { .. });
            if is_part || matches!(constant.form, Form::Plain(_)) && !constant.is_in_file() {
                continue;
            }
            let mut decoded = vec![0f32; usize::try_from(constant.elements())?];
            Weight::new(Arc::clone(&opened), Arc::clone(&constant))?.read(0, &mut decoded)?;
            let (name, shape, start) = (&constant.name, &constant.shape, values.len());
            of_function.push(json!({"name": name, "shape": shape, "start": start}));
            values.extend(decoded);
        }
        weights.insert(name, of_function);
    }
    let model = LanguageModel::open(&package, &limits)?;
    let logits = Session::new(&model, model.context(), Rounding::F32)?.decode(&ids)?;
    let shape = [ids.len(), model.n_vocab()];
    let index =
        json!({"weights": weights, "logits": {"name": "logits", "shape": shape, "start": values.len()}});
    values.extend(logits);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    fs::write(out.join("values.bin"), bytes)?;
    fs::write(out.join("index.json"), serde_json::to_vec(&index)?)?;
    Ok(())
}
