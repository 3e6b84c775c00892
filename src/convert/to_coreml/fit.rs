//! What a phone holds.

use super::profile::Profile;
use crate::arch::Ffn;
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
    /// Bytes of the cache: float16, keys and values of each layer, of so many heads of this width, for the
    /// whole context.
    pub fn cache_bytes(layers: usize, [heads, width]: [usize; 2], context: u64) -> u64 {
        let each = [layers, heads, width].map(|n| n as u64);
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
    pub fn obstacle(&self, profile: Profile, model: &str, form: &str, ffn: &Ffn) -> Option<Obstacle> {
        if profile == Profile::Gpu {
            return None;
        }
        let mut reasons = Vec::new();
        if self.total() > PHONE {
            let chunks =
                if self.chunks == 1 { "one package".into() } else { format!("{} chunks", self.chunks) };
            reasons.push(format!(
                "{} in {chunks}, {} with cache and logits; an iPhone gives one app about 3 GB (5 to 6 GB with the \
                 entitlement for more memory)",
                gigabytes(self.files),
                gigabytes(self.total())
            ));
        }
        if let Ffn::Experts { count, used, .. } = ffn {
            reasons.push(format!(
                "the Neural Engine is not known to gather weights, so that all {count} experts would be computed for \
                 each token, which goes through {used}"
            ));
        }
        let hint = "--allow-unfit writes it; --profile gpu is for Macs".to_string();
        let message = format!("{model} at {form}: {}", reasons.join("; "));
        (!reasons.is_empty()).then_some(Obstacle { message, hint, yields: false })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Router;

    #[test]
    fn phones_have_so_much() {
        // The sizes of gpt-oss-20b: 49 kB for each token.
        let cache = Needs::cache_bytes(24, [8, 64], 4096);
        assert_eq!(cache, 4096 * 49_152);
        let needs = |files, chunks| Needs { files, chunks, cache, logits: 0 };
        let of = |needs: &Needs, profile| needs.obstacle(profile, "gpt-oss-20b", "lut2", &Ffn::Gated);
        let large = needs(5_300_000_000, 6);
        let said = of(&large, Profile::Ane).unwrap();
        assert!(
            !said.yields && said.message.starts_with("gpt-oss-20b at lut2: 5.3 GB in 6 chunks, 5.5 GB with")
        );
        assert!(of(&large, Profile::Gpu).is_none() && large.warning(Profile::Gpu).is_some());
        let small = needs(2_700_000_000, 3);
        assert!(of(&small, Profile::Ane).is_none() && small.warning(Profile::Gpu).is_none());
        assert!(
            of(&needs(2_900_000_000, 1), Profile::Ane).unwrap().message.contains("2.9 GB in one package")
        );
        let router = Router::TopkSoftmax;
        let experts = Ffn::Experts { count: 32, used: 4, router, norm: false, clamp: None };
        let said = small.obstacle(Profile::Ane, "m", "f16", &experts).unwrap();
        assert!(said.message.contains("all 32 experts"), "{}", said.message);
    }
}
