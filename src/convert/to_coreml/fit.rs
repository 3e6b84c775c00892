//! What a phone holds.

use super::profile::Profile;
use crate::arch::{Decoder, Ffn};
use crate::convert::plan::Obstacle;

/// What an iPhone of 8 GB gives one app, in bytes: about 3 GB; 5 to 6 GB with the entitlement for more memory
/// (developers measure it with `os_proc_available_memory`; Apple states no number).
const PHONE: u64 = 3_000_000_000;

/// What a package takes where it runs.
pub struct Needs {
    /// Bytes of all files.
    pub files: u64,
    /// How many packages they are.
    pub chunks: usize,
    /// Bytes of the cache of keys and values.
    pub cache: u64,
    /// Bytes of the logits that one call gives.
    pub logits: u64,
}

impl Needs {
    /// Bytes of the cache: float16, keys and values of each layer for the whole context.
    pub fn cache_bytes(decoder: &Decoder, context: u64) -> u64 {
        let each = [decoder.layers, decoder.kv_heads, decoder.head_dim].map(|n| n as u64);
        each.iter().fold(context.saturating_mul(4), |product, n| product.saturating_mul(*n))
    }

    fn total(&self) -> u64 {
        self.files.saturating_add(self.cache).saturating_add(self.logits)
    }

    /// A line about it.
    pub fn note(&self) -> String {
        let total = gigabytes(self.total());
        format!(
            "where it runs it takes {total}: {} of files, {} of cache, {} of logits",
            gigabytes(self.files),
            gigabytes(self.cache),
            gigabytes(self.logits)
        )
    }

    /// Why a package should not be written for a phone.
    pub fn obstacle(&self, profile: Profile, model: &str, form: &str, decoder: &Decoder) -> Option<Obstacle> {
        if profile == Profile::Gpu {
            return None;
        }
        let hint = "--force writes it; --profile gpu is for Macs".to_string();
        if let Ffn::Experts { count, used, .. } = decoder.ffn {
            let message = format!(
                "{model} has {count} experts of which {used} are used: the Neural Engine is not known to gather \
                 weights, so that all would be computed for each token"
            );
            return Some(Obstacle { message, hint, yields: true });
        }
        (self.total() > PHONE).then(|| {
            let chunks = if self.chunks == 1 { "one package".into() } else { format!("{} chunks", self.chunks) };
            let message = format!(
                "{model} at {form}: {} in {chunks}, {} with cache and logits; an iPhone gives one app about 3 GB (5 \
                 to 6 GB with the entitlement for more memory)",
                gigabytes(self.files),
                gigabytes(self.total())
            );
            Obstacle { message, hint, yields: true }
        })
    }

    /// The same for packages that are not meant for phones.
    pub fn warning(&self, profile: Profile) -> Option<String> {
        let too_large = profile == Profile::Gpu && self.total() > PHONE;
        too_large.then(|| "it will not fit a phone, where one app gets about 3 GB".to_string())
    }
}

fn gigabytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
