//! The search itself.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::knapsack::{Offer, choose, total};
use super::table::{Subject, Table, Trial};
use super::trials::{Types, Variants, entry, offers};
use super::{Judge, Options, Sample, Step, Target, proxy};
use crate::container::open_regular;
use crate::convert::{Job, Observer, Quantize, Quantizer, Stage, Way};
use crate::error::{Error, Result};
use crate::eval::score::DivergenceSummary;
use crate::sha256::{Sha256, hex};
use crate::tensor::DType;

/// Whole models that are measured for a target of quality, at most, before the held-out text is asked.
const MOST_ROUNDS: usize = 7;
/// How often the held-out text may ask for more.
const MOST_CHECKS: usize = 4;
/// A result this near to its target is not improved further.
const NEAR: f64 = 0.96;
/// Tensors begin at multiples of this many bytes.
const ALIGN: u64 = 32;

/// What was found.
#[derive(Debug)]
pub struct Mixture {
    /// What converts the model so.
    pub quantizer: Quantizer,
    /// The type of each matrix.
    pub types: Types,
    /// Bytes of all files.
    pub bytes: u64,
    /// The KLD that single tensors promise, added up; without trials the sum of their errors.
    pub expected: f64,
    /// How the result departs from the model that is not quantized, on the text that types were chosen by.
    pub measured: Option<DivergenceSummary>,
    /// The same on the text that was held out.
    pub held_out: Option<DivergenceSummary>,
    /// All sensitivities.
    pub table: Table,
}

impl Mixture {
    /// Entries for `--tensor-type-file`, one a line.
    pub fn recipe(&self) -> String {
        self.types.iter().map(|(name, dtype)| entry(name, *dtype) + "\n").collect()
    }
}

/// Chooses a type for each tensor of the GGUF file that `quantize` would convert; what it says beyond
/// types holds (method, importance matrix, tensors whose type the user names). Without a judge nothing is
/// measured.
///
/// # Errors
/// `Misuse` for targets that cannot be met; as conversions can be planned and run; what `judge` and
/// `observer` say.
pub fn search(
    quantize: &Quantize,
    options: &Options,
    mut judge: Option<&mut dyn Judge>,
    threads: usize,
    observer: &dyn Observer,
    tell: &mut dyn FnMut(Step<'_>),
) -> Result<Mixture> {
    options.target.check()?;
    let variants = Variants::new(quantize, &options.types)?;
    let costs = proxy::costs(&variants.jobs, &variants.open, threads, observer)?;
    let subject = Subject {
        model: variants.fingerprint()?,
        rounding: rounding(quantize)?,
        text: judge.as_ref().map_or(String::new(), |j| j.text()),
    };
    let mut table = Table::new(subject, costs);
    if let Some(path) = &options.sensitivity {
        table.take_trials(path)?;
    }
    if let Some(judge) = judge.as_deref_mut() {
        measure_trials(&variants, options, &mut table, judge, tell)?;
    }
    if let Some(path) = &options.sensitivity {
        save(&table, path)?;
    }
    let mut choosing = Choosing {
        items: offers(&table, ALIGN),
        variants: &variants,
        table: &table,
        judge,
        tell,
        known: Vec::new(),
    };
    let (Candidate { types, loss, measured, .. }, held_out) = match options.target {
        Target::Kld(_) | Target::PplIncrease(_) => choosing.of_quality(&options.target)?,
        Target::Bytes(_) | Target::BitsPerWeight(_) => {
            let found = choosing.of_size(&options.target)?;
            let held_out = choosing.measured(&found.types, Sample::HeldOut)?;
            (found, held_out)
        }
    };
    let quantizer = variants.quantizer(&types)?;
    let bytes = variants.whole(&types)?.plan.total_len();
    Ok(Mixture { quantizer, types, bytes, expected: loss, measured, held_out, table })
}

fn measure_trials(
    variants: &Variants,
    options: &Options,
    table: &mut Table,
    judge: &mut dyn Judge,
    tell: &mut dyn FnMut(Step<'_>),
) -> Result<()> {
    let mut plan = variants.plan(options.measure);
    plan.retain(|(tensors, dtype)| table.measured(tensors, *dtype).is_none());
    tell(Step::Trials(plan.len(), judge.seconds()));
    for (tensors, dtype) in plan {
        let job = variants.trial(&variants.alone(&tensors, dtype), &judge.path())?;
        let kld = judge.measure(&job, Sample::Choosing)?.kld.value.max(0.0);
        let trial = Trial { tensors, dtype: dtype.to_string(), kld };
        tell(Step::Trial(&trial));
        table.trials.push(trial);
        // What is done is kept, for the case that something ends this.
        if let Some(path) = &options.sensitivity {
            save(table, path)?;
        }
    }
    Ok(())
}

fn save(table: &Table, path: &Path) -> Result<()> {
    let text = table.to_json()?;
    let stage = Stage::files_at(&[(path.to_path_buf(), text.len() as u64)], true)?;
    stage.files().iter().try_for_each(|file| file.write_at(0, text.as_bytes()))?;
    stage.commit()
}

/// How codes are chosen, in a few words.
fn rounding(quantize: &Quantize) -> Result<String> {
    let own = &quantize.quantizer;
    let named = |way: Way| match way {
        Way::Method(method) => format!("{method:?}"),
        _ => way.name().to_string(),
    };
    let mut words = Vec::new();
    if let Some(choice) = &own.method {
        words.extend(choice.fold.map(|fold| format!("{fold:?}")));
        words.extend(choice.by_tensor.iter().map(|(regex, way)| format!("{regex}={}", named(*way))));
        words.extend(choice.others.map(named));
        words.extend(choice.moments.as_ref().map(|path| digest(path)).transpose()?);
    }
    if let Some(choice) = &own.imatrix {
        words.push(digest(&choice.path)?);
        words.extend(choice.include.iter().map(|part| format!("+{part}")));
        words.extend(choice.exclude.iter().map(|part| format!("-{part}")));
    }
    Ok(if words.is_empty() { "rtn".to_string() } else { words.join(", ") })
}

/// A file's name, with what tells its content from others: its ends and its length.
fn digest(path: &Path) -> Result<String> {
    const END: u64 = 1 << 20;
    let (mut file, len) = open_regular(path)?;
    let hash = || {
        let mut bytes = len.to_le_bytes().to_vec();
        file.by_ref().take(END).read_to_end(&mut bytes)?;
        file.seek(SeekFrom::Start(len.saturating_sub(END)))?;
        file.take(END).read_to_end(&mut bytes)?;
        Ok(hex(&Sha256::digest(&bytes)[..8]))
    };
    let hash = hash().map_err(|e: std::io::Error| Error::io("read", path, e))?;
    Ok(format!("{} ({hash})", path.file_name().unwrap_or_default().display()))
}

struct Choosing<'a, 'j, 't> {
    items: Vec<Vec<Offer>>,
    variants: &'a Variants<'a>,
    table: &'a Table,
    judge: Option<&'j mut (dyn Judge + 'j)>,
    tell: &'t mut (dyn FnMut(Step<'_>) + 't),
    /// What was measured already.
    known: Vec<(Types, DivergenceSummary)>,
}

/// Types that may be the result.
struct Candidate {
    types: Types,
    /// Bytes of the tensors among whose types there is a choice.
    bytes: u64,
    /// What these are expected to lose.
    loss: f64,
    /// What was found, where it was measured.
    measured: Option<DivergenceSummary>,
}

impl Choosing<'_, '_, '_> {
    /// The best types whose tensors together have at most so many bytes.
    fn within(&self, bytes: u64) -> Option<Candidate> {
        let choice = choose(&self.items, bytes)?;
        let pairs = self.table.tensors.iter().zip(&choice);
        let types = pairs
            .filter_map(|((name, costs), &k)| Some((name.clone(), DType::from_name(costs.get_index(k)?.0)?)));
        let types = self.variants.recipe(&types.collect());
        let Offer { bytes, loss } = total(&self.items, &choice);
        Some(Candidate { types, bytes, loss, measured: None })
    }

    /// The sum of what `of` says of each tensor's offers.
    fn extreme(&self, of: fn(u64, u64) -> u64) -> u64 {
        let of_item = |offers: &Vec<Offer>| offers.iter().map(|o| o.bytes).reduce(of);
        self.items.iter().filter_map(of_item).sum()
    }

    /// The best that is no larger than the target.
    fn of_size(&mut self, target: &Target) -> Result<Candidate> {
        let weights = self.variants.jobs.first().map_or(0, |j| j.plan.parameters());
        let weigh = |job: &Job| match target {
            Target::Bytes(_) => job.plan.total_len(),
            _ => job.plan.tensors.iter().map(|t| t.nbytes).sum(),
        };
        let most = match *target {
            Target::Bytes(most) => most,
            Target::BitsPerWeight(bits) => (bits * weights as f64 / 8.0).min(9e18) as u64,
            Target::Kld(_) | Target::PplIncrease(_) => return Err(Error::misuse("is no target of size")),
        };
        let least = self.extreme(u64::min);
        let smallest = self.within(least).ok_or_else(|| Error::misuse("nothing to choose"))?;
        let smallest = weigh(&self.variants.whole(&smallest.types)?);
        let too_little = || {
            let message = match target {
                Target::BitsPerWeight(bits) => {
                    let least = smallest as f64 * 8.0 / weights.max(1) as f64;
                    format!(
                        "no mixture has {bits} bits for each weight or fewer: the smallest has {least:.4}"
                    )
                }
                _ => format!("no mixture has {most} bytes or fewer: the smallest has {smallest}"),
            };
            Error::misuse(message).hint("allow smaller types with --types, or a larger file")
        };
        // What lies beside the open tensors; headers of shards may still differ.
        let mut left =
            most.checked_sub(smallest).and_then(|n| n.checked_add(least)).ok_or_else(too_little)?;
        loop {
            let found = self.within(left).ok_or_else(too_little)?;
            let weight = weigh(&self.variants.whole(&found.types)?);
            match weight.checked_sub(most) {
                None | Some(0) => return self.tried(found),
                Some(excess) => left = found.bytes.checked_sub(excess).ok_or_else(too_little)?,
            }
        }
    }

    /// As small as the quality allows, and what was found on the text held out.
    fn of_quality(&mut self, target: &Target) -> Result<(Candidate, Option<DivergenceSummary>)> {
        if self.judge.is_none() {
            return Err(Error::misuse("a target of quality has to be measured")
                .hint("use a build with the feature ggml, or give a size: --target-size, --target-bpw"));
        }
        let mut strictness = 1.0;
        for _ in 0..MOST_CHECKS {
            let found = self.of_measured_quality(target, strictness)?;
            let held_out = self.measured(&found.types, Sample::HeldOut)?;
            match held_out.as_ref().and_then(|summary| target.quality(summary)) {
                Some((value, most)) if value > most => strictness *= 0.98 * most / value,
                _ => return Ok((found, held_out)),
            }
        }
        Err(Error::misuse("the text held out always asks for more than the text by which types are chosen")
            .hint("measure more with --windows, or another text with --measure-text"))
    }

    /// As small as possible, so that `strictness` times the target is kept on the text by which types are
    /// chosen. The sum of what single tensors lose gives the order of models; how it relates to what they
    /// lose together is learnt from each that is measured.
    fn of_measured_quality(&mut self, target: &Target, strictness: f64) -> Result<Candidate> {
        let (least, largest) = (self.extreme(u64::min), self.extreme(u64::max));
        // Too small, and what is enough or the largest there is.
        let (mut low, mut high) = (least.saturating_sub(1), largest);
        let mut best: Option<Candidate> = None;
        // The first guess: losses add up to the KLD.
        let mut aim = match *target {
            Target::Kld(most) | Target::PplIncrease(most) => most * strictness,
            _ => 0.0,
        };
        for round in 0..=MOST_ROUNDS {
            let mut bytes = self.least_bytes(aim, low + 1, high);
            if best.is_some() && bytes >= high {
                bytes = low + (high - low) / 2;
            } else if best.is_none() && round == MOST_ROUNDS {
                bytes = largest;
            }
            let Some(found) = self.within(bytes) else { break };
            let found = self.tried(found)?;
            let quality = found.measured.as_ref().and_then(|summary| target.quality(summary));
            let Some((value, most)) = quality else { break };
            let ratio = value / (most * strictness);
            aim = found.loss / ratio * (1.0 + NEAR) / 2.0;
            if ratio <= 1.0 {
                high = found.bytes;
                best = Some(found);
            } else if bytes >= largest {
                let message =
                    format!("no mixture of these types meets the target {most}: the best reaches {value:.6}");
                return Err(Error::misuse(message).hint("allow larger types with --types, or a greater loss"));
            } else {
                low = bytes;
            }
            let is_near = (NEAR..=1.0).contains(&ratio) || high <= least || high - low <= high / 500;
            if best.is_some() && (is_near || round + 1 >= MOST_ROUNDS) {
                break;
            }
        }
        best.ok_or_else(|| Error::misuse("no mixture of these types was found"))
    }

    /// With its measurement, which is told.
    fn tried(&mut self, mut found: Candidate) -> Result<Candidate> {
        let known = self.known.iter().find(|(types, _)| *types == found.types);
        found.measured = known.map(|(_, summary)| summary.clone());
        if found.measured.is_none()
            && let Some(summary) = self.measured(&found.types, Sample::Choosing)?
        {
            let bytes = self.variants.whole(&found.types)?.plan.total_len();
            (self.tell)(Step::Joint(bytes, found.loss, &summary));
            self.known.push((found.types.clone(), summary.clone()));
            found.measured = Some(summary);
        }
        Ok(found)
    }

    /// The fewest bytes within these bounds, with which the sum of losses is at most `loss`.
    fn least_bytes(&self, loss: f64, from: u64, to: u64) -> u64 {
        let (mut low, mut high) = (from, to);
        while low < high && high - low > high / 10_000 {
            let middle = low + (high - low) / 2;
            match self.within(middle) {
                Some(found) if found.loss <= loss => high = middle,
                _ => low = middle + 1,
            }
        }
        high
    }

    fn measured(&mut self, types: &Types, sample: Sample) -> Result<Option<DivergenceSummary>> {
        let Some(judge) = self.judge.as_deref_mut() else { return Ok(None) };
        let mut all = self.variants.stored.clone();
        all.extend(types.iter().map(|(name, dtype)| (name.clone(), *dtype)));
        let job = self.variants.trial(&all, &judge.path())?;
        judge.measure(&job, sample).map(Some)
    }
}
