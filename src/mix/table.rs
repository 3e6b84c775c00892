//! What each tensor loses as each type: measured, or estimated; kept in a JSON file between runs.

use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::container::side::read_json;
use crate::convert::Role;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Version of the file.
const VERSION: u32 = 1;
/// Largest file that is read.
const MAX_BYTES: u64 = 64 << 20;
/// More nats than any model departs by.
const MOST_KLD: f64 = 1e6;
/// How much more than a layer's matrix the embeddings and the output matter, about: 7 and 20 times was
/// measured on the small trained model, by the median of its layers.
const ENDS: f64 = 10.0;
/// Smaller errors and divergences are as good as none.
const LEAST: f64 = 1e-12;

/// The sensitivities of a model's tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    version: u32,
    /// What they hold for: another model, rounding or text has others.
    pub of: Subject,
    /// Tensors in the order of the output, each with its types.
    pub tensors: IndexMap<String, IndexMap<String, Cost>>,
    /// Divergences that were measured.
    pub trials: Vec<Trial>,
}

/// What a table holds for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// SHA-256 of names, shapes and some values of the tensors.
    pub model: String,
    /// How codes are chosen: method, importance matrix.
    pub rounding: String,
    /// Where the divergences were measured; empty where none are.
    pub text: String,
}

/// A tensor as one type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Bytes in the file.
    pub bytes: u64,
    /// The error of its output as a share of the output: both mean squares.
    pub error: f64,
}

/// A measured divergence from the model that is not quantized.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The tensors that were of this type, while all others were not quantized.
    pub tensors: Vec<String>,
    /// The type.
    #[serde(rename = "type")]
    pub dtype: String,
    /// Mean KLD in nats.
    pub kld: f64,
}

impl Table {
    /// Without trials.
    pub fn new(of: Subject, tensors: IndexMap<String, IndexMap<String, Cost>>) -> Self {
        Self { version: VERSION, of, tensors, trials: Vec::new() }
    }

    /// Takes over the trials that a file holds; none where there is no file. Where nothing is to be
    /// measured, those of any text count.
    ///
    /// # Errors
    /// `Malformed` for what is no such file, `Misuse` for one of something else, `Io`.
    pub fn take_trials(&mut self, path: &Path) -> Result<()> {
        let Some(kept) = read_json::<Self>(path, MAX_BYTES)? else { return Ok(()) };
        let hint = "name another file with --sensitivity, or remove this one";
        if kept.version != VERSION {
            let message =
                format!("holds sensitivities in version {}, version {VERSION} is read", kept.version);
            return Err(Error::unsupported(message).at(path).hint(hint));
        }
        if self.of.text.is_empty() {
            self.of.text = kept.of.text.clone();
        }
        for (what, theirs, own) in [
            ("model", &kept.of.model, &self.of.model),
            ("rounding", &kept.of.rounding, &self.of.rounding),
            ("text", &kept.of.text, &self.of.text),
        ] {
            if theirs != own && !kept.trials.is_empty() {
                let message = format!("holds the sensitivities for another {what}: {theirs}, this is {own}");
                return Err(Error::misuse(message).at(path).hint(hint));
            }
        }
        if let Some(t) = kept.trials.iter().find(|t| !(0.0..=MOST_KLD).contains(&t.kld)) {
            let message = format!("the KLD {} of {} is no divergence", t.kld, t.tensors.join(", "));
            return Err(Error::malformed(message).at(path));
        }
        self.trials = kept.trials;
        Ok(())
    }

    /// The file's bytes.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self);
        text.map(|t| t + "\n").map_err(|e| Error::malformed(format!("the sensitivities: {e}")))
    }

    /// The divergence that was measured for these tensors as this type.
    pub fn measured(&self, tensors: &[String], dtype: DType) -> Option<f64> {
        let dtype = dtype.to_string();
        self.trials.iter().find(|t| t.dtype == dtype && t.tensors == tensors).map(|t| t.kld)
    }

    /// What a tensor is expected to add to the KLD as each of its types, in their order.
    ///
    /// Small divergences grow with the square of the error. So a trial of the tensor, or of several with
    /// it, gives the factor between error and divergence; between two trials it changes evenly, as both
    /// are seen in logarithms. Without any trial the error itself stands for the divergence; but the ends of
    /// a model count ten times, since nothing is added to what they say.
    pub fn losses(&self, name: &str) -> Vec<f64> {
        let Some(costs) = self.tensors.get(name) else { return Vec::new() };
        let error = |name: &str, dtype: &str| self.tensors.get(name)?.get(dtype).map(|c| c.error);
        // Of each trial: whether the tensor was alone, and logarithms of its error then and of the factor.
        let mut known: Vec<(bool, f64, f64)> = Vec::new();
        for trial in self.trials.iter().filter(|t| t.tensors.iter().any(|n| n == name)) {
            let sum: f64 = trial.tensors.iter().filter_map(|n| error(n, &trial.dtype)).sum();
            if let Some(own) = error(name, &trial.dtype).filter(|own| *own > LEAST && sum > LEAST) {
                known.push((trial.tensors.len() == 1, own.ln(), (trial.kld.max(LEAST) / sum).ln()));
            }
        }
        // What is known of the tensor alone says more.
        if known.iter().any(|k| k.0) {
            known.retain(|k| k.0);
        }
        known.sort_by(|a, b| a.1.total_cmp(&b.1));
        let factor = |error: f64| {
            let at = error.max(LEAST).ln();
            let above = known.partition_point(|k| k.1 < at);
            match (above.checked_sub(1).and_then(|k| known.get(k)), known.get(above)) {
                (Some(a), Some(b)) => (a.2 + (b.2 - a.2) * (at - a.1) / (b.1 - a.1)).exp(),
                (Some(only), None) | (None, Some(only)) => only.2.exp(),
                (None, None) if matches!(Role::of(name), Role::TokenEmbd | Role::Output) => ENDS,
                (None, None) => 1.0,
            }
        };
        costs.values().map(|c| c.error * factor(c.error)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let costs = |errors: [f64; 2]| {
            let cost = |error| Cost { bytes: 8, error };
            IndexMap::from([("Q2_K".to_string(), cost(errors[0])), ("Q4_K".to_string(), cost(errors[1]))])
        };
        let tensors = [("a".to_string(), costs([0.1, 0.01])), ("b".to_string(), costs([0.3, 0.02]))];
        let of = Subject { model: "m".into(), rounding: "r".into(), text: "t".into() };
        Table::new(of, IndexMap::from(tensors))
    }

    fn trial(tensors: &[&str], dtype: &str, kld: f64) -> Trial {
        Trial { tensors: tensors.iter().map(|t| t.to_string()).collect(), dtype: dtype.into(), kld }
    }

    #[test]
    fn losses_follow_the_trials() {
        let mut table = table();
        assert_eq!(table.losses("a"), [0.1, 0.01]);
        assert_eq!(table.losses("c"), [0.0; 0]);
        table.trials.push(trial(&["a", "b"], "Q2_K", 0.8));
        let close = |found: Vec<f64>, expected: [f64; 2]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        };
        close(table.losses("a"), [0.2, 0.02]);
        close(table.losses("b"), [0.6, 0.04]);
        table.trials.push(trial(&["b"], "Q4_K", 0.05));
        close(table.losses("a"), [0.2, 0.02]);
        close(table.losses("b"), [0.75, 0.05]);
        table.trials.push(trial(&["b"], "Q2_K", 0.9));
        close(table.losses("b"), [0.9, 0.05]);
        // Between them: the factors are 3 and 2.5.
        let between = Cost { bytes: 8, error: (0.3f64 * 0.02).sqrt() };
        table.tensors["b"].insert("Q3_K".to_string(), between);
        assert!((table.losses("b")[2] - between.error * 7.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn files_of_something_else_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.json");
        let mut kept = table();
        assert!(table().take_trials(&path).is_ok());
        kept.trials.push(trial(&["a"], "Q2_K", 0.25));
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(&kept.to_json().unwrap());
        let mut own = table();
        own.take_trials(&path).unwrap();
        assert_eq!(own, kept);
        assert_eq!(own.measured(&["a".into()], DType::Q2_K), Some(0.25));
        assert_eq!(own.measured(&["a".into()], DType::Q4_K), None);
        for (what, says) in
            [("\"m\"", "another model"), ("\"r\"", "another rounding"), ("\"t\"", "another text")]
        {
            write(&kept.to_json().unwrap().replace(what, "\"other\""));
            assert!(table().take_trials(&path).unwrap_err().to_string().contains(says));
        }
        write(&kept.to_json().unwrap().replace("\"version\": 1", "\"version\": 2"));
        assert!(table().take_trials(&path).unwrap_err().to_string().contains("version 2"));
        write(&kept.to_json().unwrap().replace("0.25", "-0.25"));
        assert!(table().take_trials(&path).unwrap_err().to_string().contains("no divergence"));
        write("{}");
        assert!(table().take_trials(&path).is_err());
    }
}
