//! An importance matrix that grows: from a text, and from files of earlier ones.
//!
//! Sums are kept in F64, so that neither their order nor the length of the text shows in the F32 of
//! the file. Values, names, metadata and order are those of llama.cpp's imatrix tool
//! (`tools/imatrix/imatrix.cpp`).

use std::collections::BTreeMap;

use serde::Serialize;

use crate::container::imatrix::{ImportanceMatrix, Sums, to_flat, to_gguf};
use crate::error::{Error, Result};

/// The sums of all matrices so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Importance {
    /// By the matrix they belong to, such as `blk.0.ffn_down.weight`.
    pub sums: BTreeMap<String, Sums>,
    /// The texts, and those of the files that were added.
    pub datasets: Vec<String>,
}

/// The file formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// What llama.cpp writes today.
    Gguf,
    /// The flat format (.dat) of before.
    Flat,
}

/// How the tokens of a text fell to the experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Coverage {
    /// The layer.
    pub layer: u32,
    /// Tokens that came to each expert.
    pub tokens: Vec<u64>,
    /// Experts to which none came: their importance stays 1 throughout.
    pub unseen: Vec<usize>,
    /// Experts to which fewer than a tenth of an equal share came.
    pub rarely_seen: Vec<usize>,
}

impl Importance {
    /// The sums of a matrix, zeros where there are none yet.
    ///
    /// # Errors
    /// `Misuse` when there are some already, of another number of values or experts.
    pub fn entry(&mut self, name: &str, values: usize, experts: usize) -> Result<&mut Sums> {
        if !self.sums.contains_key(name) {
            let sums = Sums { squares: vec![0.0; values], counts: vec![0; experts] };
            self.sums.insert(name.to_string(), sums);
        }
        let differ = |sums: &Sums| {
            let found = format!("{} values of {} experts", sums.squares.len(), sums.counts.len());
            Error::misuse(format!(
                "{name:?} has {values} values of {experts} experts here, and {found} there"
            ))
            .hint("only importance matrices of the same model can be added")
        };
        let sums = self.sums.entry(name.to_string()).or_default();
        if sums.squares.len() != values {
            return Err(differ(sums));
        }
        if sums.counts.len() == 1 {
            // The flat format has one count for all experts.
            sums.counts = vec![sums.counts.first().copied().unwrap_or(0); experts];
        } else if experts == 1 && sums.counts.iter().all(|n| Some(n) == sums.counts.first()) {
            sums.counts.truncate(1);
        }
        if sums.counts.len() != experts {
            return Err(differ(sums));
        }
        Ok(sums)
    }

    /// Adds what a file holds; `window` is the size of its windows, where it does not say.
    ///
    /// # Errors
    /// As [`ImportanceMatrix::sums`] and [`Self::entry`], and `Malformed` for sums that are not finite.
    pub fn add(&mut self, matrix: &ImportanceMatrix, window: u32) -> Result<()> {
        for (name, entry) in &matrix.entries {
            let added = matrix.sums(name, entry, window)?;
            if let Some(v) = added.squares.iter().find(|v| !v.is_finite() || **v < 0.0) {
                let message = format!("the entry of {name:?} holds {v}, which is no sum of squares");
                return Err(Error::malformed(message).at(matrix.path()));
            }
            let known = self.sums.get(name).map_or(1, |s| s.counts.len());
            let experts = added.counts.len();
            // One count speaks for all experts.
            let sums = self
                .entry(name, added.squares.len(), if experts == 1 { known } else { experts })
                .map_err(|e| e.at(matrix.path()))?;
            for (sum, square) in sums.squares.iter_mut().zip(&added.squares) {
                *sum += square;
            }
            for (i, count) in sums.counts.iter_mut().enumerate() {
                let more = added.counts.get(if experts == 1 { 0 } else { i }).copied().unwrap_or(0);
                *count = count.saturating_add(more);
            }
        }
        self.datasets.extend(matrix.datasets.iter().cloned());
        Ok(())
    }

    /// The bytes of the file. `window` is the size of the text's windows in tokens.
    ///
    /// # Errors
    /// `Misuse` when there is nothing to write; what the format cannot hold.
    pub fn to_file(&self, format: Format, window: u32) -> Result<Vec<u8>> {
        if self.sums.is_empty() {
            return Err(Error::misuse("no matrix was multiplied with anything: there is nothing to write"));
        }
        let most = self.sums.values().flat_map(|s| &s.counts).max().copied().unwrap_or(0);
        let windows = u32::try_from(most / u64::from(window.max(1))).unwrap_or(u32::MAX);
        let to_bytes = if format == Format::Gguf { to_gguf } else { to_flat };
        to_bytes(&self.sums, &self.datasets, windows, window)
    }

    /// How the tokens fell to experts, layer by layer; empty where there are none.
    pub fn coverage(&self) -> Vec<Coverage> {
        let mut layers = BTreeMap::new();
        for (name, sums) in &self.sums {
            let layer = name.strip_prefix("blk.").and_then(|n| n.split('.').next()?.parse::<u32>().ok());
            if let (Some(layer), 2..) = (layer, sums.counts.len()) {
                // All matrices of a layer's experts get the same tokens.
                layers.entry(layer).or_insert(&sums.counts);
            }
        }
        let which = |tokens: &[u64], wanted: &dyn Fn(u64) -> bool| {
            tokens.iter().enumerate().filter(|(_, n)| wanted(**n)).map(|(i, _)| i).collect()
        };
        let of = |(layer, tokens): (u32, &Vec<u64>)| {
            let share = tokens.iter().sum::<u64>() / tokens.len().max(1) as u64;
            let unseen = which(tokens, &|n| n == 0);
            let rarely_seen = which(tokens, &|n| n > 0 && n < share / 10);
            Coverage { layer, tokens: tokens.clone(), unseen, rarely_seen }
        };
        layers.into_iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_counted() {
        let mut all = Importance::default();
        for (name, counts) in [
            ("blk.1.ffn_up_exps.weight", vec![1000, 0, 50, 950]),
            ("blk.1.ffn_down_exps.weight", vec![1000, 0, 50, 950]),
            ("blk.0.ffn_up.weight", vec![1000]),
        ] {
            let sums = all.entry(name, counts.len() * 2, counts.len()).unwrap();
            sums.counts = counts;
        }
        let coverage = all.coverage();
        assert_eq!(coverage.len(), 1);
        assert_eq!((coverage[0].layer, &coverage[0].unseen[..]), (1, &[1][..]));
        assert_eq!(coverage[0].rarely_seen, [] as [usize; 0]);
        all.entry("blk.1.ffn_down_exps.weight", 8, 4).unwrap().counts = vec![1000, 0, 49, 951];
        assert_eq!(all.coverage()[0].rarely_seen, [2]);
    }

    #[test]
    fn one_count_speaks_for_all() {
        let mut all = Importance::default();
        all.entry("a", 4, 1).unwrap().counts = vec![7];
        assert_eq!(all.entry("a", 4, 2).unwrap().counts, [7, 7]);
        assert_eq!(all.entry("a", 4, 1).unwrap().counts, [7]);
        all.entry("a", 4, 2).unwrap().counts = vec![7, 8];
        assert!(all.entry("a", 4, 1).is_err());
        assert!(all.entry("a", 4, 4).is_err());
        assert!(all.entry("a", 6, 2).is_err());
    }
}
