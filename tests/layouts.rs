//! The same model in several layouts: what transformers 5 writes and what it read before become the
//! same GGUF tensors.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::Made;
use qconv::ErrorKind::{Limit, Malformed};
use qconv::container::gguf::Gguf;
use qconv::convert::HfToGguf;
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::json;

type Tensors = BTreeMap<String, (DType, Vec<u64>, Vec<u8>)>;

fn converted(made: &Made, like: &Path) -> Tensors {
    let dir = tempfile::tempdir().unwrap();
    made.write(&dir.path().join("hf"), like);
    let output = dir.path().join("a.gguf");
    common::convert(&dir.path().join("hf"), &output, Some("bf16"));
    let store = Gguf::open(&output, &Limits::default()).unwrap().store;
    let read = |t: &qconv::tensor::TensorInfo| (t.dtype, t.shape.clone(), store.read_all(t).unwrap());
    store.tensors().iter().map(|t| (t.name.clone(), read(t))).collect()
}

fn refused(made: &Made, like: &Path, says: &str) {
    let dir = tempfile::tempdir().unwrap();
    made.write(dir.path(), like);
    let plan = HfToGguf { source: dir.path().into(), ..HfToGguf::default() }.plan();
    let error = plan.map(|_| "planned").expect_err(says);
    assert!(matches!(error.kind(), Malformed | Limit), "{error}");
    assert!(error.to_string().contains(says), "{says:?} is not in: {error}");
}

/// Moves the experts of every layer into one tensor each for gate above up and for down.
fn fuse(made: &mut Made, module: &str, [gate, up, down]: [&str; 3], to: &str) {
    let prefixes: Vec<String> = (0..8).map(|i| format!("model.layers.{i}.{module}.experts")).collect();
    for (i, prefix) in prefixes.iter().enumerate() {
        let has = |made: &Made, e: usize| {
            made.tensors.iter().any(|(name, _)| *name == format!("{prefix}.{e}.{gate}.weight"))
        };
        let (mut gate_up, mut downs, mut shapes, mut e) = (Vec::new(), Vec::new(), Vec::new(), 0);
        while has(made, e) {
            for part in [gate, up] {
                let (_, shape, bytes) = made.take(&format!("{prefix}.{e}.{part}.weight"));
                shapes = shape;
                gate_up.extend(bytes);
            }
            downs.extend(made.take(&format!("{prefix}.{e}.{down}.weight")).2);
            e += 1;
        }
        if let [rows, cols] = shapes[..] {
            let n = e as u64;
            let fused = made.clone();
            let to = format!("model.layers.{i}.{to}.experts");
            *made = fused.with(&format!("{to}.gate_up_proj"), "BF16", &[n, 2 * rows, cols], gate_up).with(
                &format!("{to}.down_proj"),
                "BF16",
                &[n, cols, rows],
                downs,
            );
        }
    }
}

#[test]
fn experts_in_one_tensor() {
    for name in ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2-qlora"] {
        let like = common::fixture(&format!("models/{name}"));
        let apart = Made::of(&like);
        let mut fused = apart.clone();
        if name == "mixtral" {
            fuse(&mut fused, "block_sparse_moe", ["w1", "w3", "w2"], "mlp");
            for (name, _) in &mut fused.tensors {
                *name = name.replace("block_sparse_moe.gate", "mlp.gate");
            }
        } else {
            fuse(&mut fused, "mlp", ["gate_proj", "up_proj", "down_proj"], "mlp");
        }
        let names: Vec<&String> = fused.tensors.iter().map(|(name, _)| name).collect();
        assert!(!names.iter().any(|n| n.contains("experts.0.")), "{names:?}");
        let (apart, fused) = (converted(&apart, &like), converted(&fused, &like));
        assert!(apart.keys().any(|k| k.contains("ffn_gate_exps")));
        assert!(apart == fused, "{name}");
    }
}

#[test]
fn fused_experts_that_do_not_fit() {
    let like = common::fixture("models/qwen3_moe");
    let mut good = Made::of(&like);
    fuse(&mut good, "mlp", ["gate_proj", "up_proj", "down_proj"], "mlp");
    let changed = |change: &dyn Fn(&mut Made)| {
        let mut made = good.clone();
        change(&mut made);
        made
    };
    const EXPERTS: &str = "num_local_experts";
    const GATE_UP: &str = "model.layers.1.mlp.experts.gate_up_proj";
    let fewer = changed(&|m| m.config[EXPERTS] = json!(3));
    refused(&fewer, &like, "config.json says there are 3");
    let missing = changed(&|m| drop(m.take(GATE_UP)));
    refused(&missing, &like, "\"model.layers.1.mlp.experts.0.gate_proj.weight\" is missing");
    let odd = changed(&|m| {
        let (_, shape, bytes) = m.get(GATE_UP);
        shape[1] -= 1;
        bytes.truncate((shape[0] * shape[1] * shape[2] * 2) as usize);
    });
    refused(&odd, &like, "does not fall into 2 parts");
    let flat = changed(&|m| m.get(GATE_UP).1 = vec![4 * 256 * 128]);
    refused(&flat, &like, "config.json says there are");
    let endless = changed(&|m| {
        *m.get("model.layers.0.mlp.experts.down_proj") = ("BF16".into(), vec![1 << 62, 0, 64], vec![]);
        m.config[EXPERTS] = json!(1u64 << 62);
    });
    refused(&endless, &like, "are allowed");
    let both = changed(&|m| {
        let one = m.get("model.layers.1.mlp.experts.down_proj").clone();
        let len = one.2.len() / one.1[0] as usize;
        let name = "model.layers.1.mlp.experts.0.down_proj.weight".to_string();
        m.tensors.push((name, ("BF16".into(), one.1[1..].to_vec(), one.2[..len].to_vec())));
    });
    refused(&both, &like, "takes the same place as");
}

/// DeepSeek V3 has layers behind the last that predict further tokens. They are left out where
/// config.json says that there are such.
#[test]
fn layers_of_further_tokens_are_left_out() {
    let like = common::fixture("models/deepseek_v2-qlora");
    let plain = Made::of(&like);
    let mut more = plain.clone();
    for (name, tensor) in plain.tensors.iter().filter(|(name, _)| name.contains("layers.1.")) {
        more.tensors.push((name.replace("layers.1.", "layers.2."), tensor.clone()));
    }
    refused(&more, &like, "belongs to layer 2, config.json says there are 2");
    more = more.with("model.layers.2.eh_proj.weight", "BF16", &[1], [0, 0]);
    more.config["num_nextn_predict_layers"] = json!(1);
    assert!(converted(&more, &like) == converted(&plain, &like));
}
