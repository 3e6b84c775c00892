//! Which tensors are rounded by which method, by what second moments.

use std::path::PathBuf;
use std::sync::Arc;

use regex::{Regex, RegexBuilder};

use super::fold::Folding;
use super::plan::{Guide, Importance, Rounding, TensorPlan};
use super::readers::Readers;
use crate::arch::folds;
use crate::block::gram::PANEL;
use crate::block::{Lattice, lattice};
use crate::container::moments::{Input, Moments};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::quantize::{Method, Tuning};

/// How the weights of a tensor become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// Each block by itself, all weights counting alike.
    Rtn,
    /// Each row by the type's own search, weighed by an importance matrix or the diagonal of second moments.
    Imatrix,
    /// By second moments.
    Method(Method),
}

/// The methods that were asked for, and the moments they need.
#[derive(Clone, Debug, Default)]
pub struct MethodChoice {
    /// Scales that move between tensors before anything is rounded.
    pub fold: Option<Folding>,
    /// For tensors whose name matches; the first that does counts.
    pub by_tensor: Vec<(Regex, Way)>,
    /// What the recipe's rules may name for tensors of a role.
    pub by_rule: Vec<Way>,
    /// For all others; as llama.cpp does where there is none.
    pub others: Option<Way>,
    /// What `qconv calibrate` wrote.
    pub moments: Option<PathBuf>,
}

/// Methods with their moments opened.
pub(super) struct Guiding {
    pub choice: MethodChoice,
    pub moments: Option<Arc<Moments>>,
}

impl Guiding {
    /// `has_imatrix` says whether an importance matrix is given beside.
    ///
    /// # Errors
    /// As the moments open; `Misuse` where a method lacks them.
    pub fn open(choice: &MethodChoice, has_imatrix: bool, limits: &Limits) -> Result<Self> {
        choice.check(has_imatrix)?;
        let moments = choice.moments.as_ref().map(|path| Moments::open(path, limits).map(Arc::new));
        Ok(Self { choice: choice.clone(), moments: moments.transpose()? })
    }

    /// How a tensor, named as in the output, shall be rounded; `by_rule` is what the recipe says.
    pub fn way(&self, name: &str, by_rule: Option<Way>) -> Option<Way> {
        let matching = self.choice.by_tensor.iter().find(|(regex, _)| regex.is_match(name));
        matching.map(|(_, way)| *way).or(by_rule).or(self.choice.others)
    }

    /// The guide for a tensor, named as in the model, whose weights take such values, or why there is none. Where some experts have seen
    /// too little, it says so as well.
    pub fn guide(
        &self,
        method: Method,
        name: &str,
        lattice: Lattice,
    ) -> std::result::Result<(Guide, Option<String>), String> {
        let Some(Importance::Diagonal { moments, input }) = self.diagonal(name) else {
            return Err("the moments have nothing of what it reads".into());
        };
        if !input.columns.is_multiple_of(PANEL as u64) {
            return Err(format!("rows of {} are no multiple of {PANEL}", input.columns));
        }
        let counts = moments.counts(&input).unwrap_or_default();
        let few = counts.iter().filter(|&&n| n < method.least_tokens()).count();
        let why = match few {
            0 => None,
            n if n == counts.len() => {
                return Err(format!("fewer than {} tokens reached it", method.least_tokens()));
            }
            n => Some(format!(
                "fewer than {} tokens reached {n} of {} experts, which are weighed by the diagonal",
                method.least_tokens(),
                counts.len()
            )),
        };
        Ok((Guide { moments, input, method, lattice, readers: None }, why))
    }

    /// The guide for embeddings, which are no factor of a product: by what reads them. `None` where that is
    /// not known, or another reason stands against it.
    pub fn guide_embeddings(
        &self,
        method: Method,
        tensors: &[TensorPlan],
        originals: &[String],
        number: usize,
        arch: &str,
    ) -> Result<Option<Guide>> {
        let (tensor, name) = (&tensors[number], &originals[number]);
        let columns = tensor.rows().0;
        let (Some(&lattice), Some(moments)) = (lattice(tensor.dtype), &self.moments) else { return Ok(None) };
        if moments.input_of(name).is_some() || !columns.is_multiple_of(PANEL as u64) {
            return Ok(None);
        }
        let readers = Readers::find(&folds(arch)?, originals, tensors, columns);
        let input = Input { name: name.clone(), weights: vec![name.clone()], columns, experts: 1 };
        let guide =
            |readers| Guide { moments: moments.clone(), input, method, lattice, readers: Some(readers) };
        Ok(readers.map(guide))
    }

    /// Whether what the moments know of a tensor's input is of its size.
    ///
    /// # Errors
    /// `Misuse` where they are of another model.
    pub fn check_fit(&self, name: &str, tensor: &TensorPlan) -> Result<()> {
        let Some(moments) = &self.moments else { return Ok(()) };
        let Some(input) = moments.input_of(name) else { return Ok(()) };
        let (columns, rows) = tensor.rows();
        let experts = (tensor.source.elements() / columns / rows).max(1);
        if (input.columns, input.experts) == (columns, experts) {
            return Ok(());
        }
        let path = self.choice.moments.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
        Err(Error::misuse(format!(
            "has {columns} columns and {experts} experts, in the second moments ({path}) it has {} and {}",
            input.columns, input.experts
        ))
        .hint("they are of another model: make this one's with qconv calibrate"))
    }

    /// The mean squares of a tensor's input; `None` where it was not calibrated.
    pub fn diagonal(&self, name: &str) -> Option<Importance> {
        let moments = self.moments.as_ref()?;
        let input = moments.input_of(name)?.clone();
        Some(Importance::Diagonal { moments: moments.clone(), input })
    }

    /// What is rounded how, and where that is not what was asked for.
    pub fn notes(&self, tensors: &[TensorPlan]) -> Vec<String> {
        let mut counts: indexmap::IndexMap<&str, usize> = indexmap::IndexMap::new();
        for t in tensors.iter().filter(|t| t.is_rounded()) {
            *counts.entry(t.rounding.name()).or_default() += 1;
        }
        let counts: Vec<_> = counts.iter().map(|(name, n)| format!("{n} by {name}")).collect();
        let mut notes = vec![format!("tensors are rounded: {}", counts.join(", "))];
        let mut fallbacks: indexmap::IndexMap<(&str, &str), Vec<&TensorPlan>> = indexmap::IndexMap::new();
        for t in tensors {
            if let Some(f) = &t.fallback {
                fallbacks.entry((f.wanted, &f.why)).or_default().push(t);
            }
        }
        for ((wanted, why), tensors) in fallbacks {
            let shown: Vec<_> =
                tensors.iter().take(3).map(|t| format!("{} by {}", t.name, t.rounding.name())).collect();
            let more = if tensors.len() > 3 { ", ..." } else { "" };
            notes.push(format!(
                "not by {wanted}, since {why}: {} ({}{more})",
                tensors.len(),
                shown.join(", ")
            ));
        }
        notes
    }
}

/// The name of the method that moves scales between tensors, and leaves the rounding to another.
const AWQ: &str = "awq";

/// What a method for a whole model names: whether scales are moved first, and what rounds. `awq` alone
/// rounds by [`Way::Imatrix`], whose search for each block's scale is where weights are clipped.
///
/// # Errors
/// `Misuse` for an unknown name.
pub fn parse_method(name: &str) -> Result<(Option<Folding>, Way)> {
    match name.strip_prefix(AWQ) {
        Some("") => Ok((Some(Folding::Search), Way::Imatrix)),
        Some(rest) if rest.starts_with('+') => Ok((Some(Folding::Search), Way::parse(&rest[1..])?)),
        _ => Ok((None, Way::parse(name)?)),
    }
}

/// A file type that names AWQ as well, such as `awq_q4_0`: the type without it.
pub fn strip_awq(file_type: &str) -> Option<&str> {
    let (first, rest) = file_type.split_once('_')?;
    first.eq_ignore_ascii_case(AWQ).then_some(rest)
}

impl Way {
    /// By its name: `rtn`, `imatrix`, or that of a method.
    ///
    /// # Errors
    /// `Misuse` for an unknown name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "rtn" => Ok(Self::Rtn),
            "imatrix" => Ok(Self::Imatrix),
            _ => Method::parse(name).map(Self::Method).ok_or_else(|| {
                if name.split('+').any(|part| part == AWQ) {
                    return Error::misuse(format!("{name}: {AWQ} stands for a whole model, and first"))
                        .hint("give it with --method, such as --method awq+gptq");
                }
                let known: Vec<_> = ["rtn", "imatrix"].into_iter().chain(Method::names()).collect();
                Error::misuse(format!("{name:?} is no method; there are {}", known.join(", ")))
            }),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Imatrix => "imatrix",
            Self::Method(method) => method.name(),
        }
    }
}

/// `REGEX=METHOD`, such as `ffn_down=gptq`.
///
/// # Errors
/// `Misuse` when it is none.
pub fn parse_tensor_method(text: &str) -> Result<(Regex, Way)> {
    let (pattern, name) = text
        .rsplit_once('=')
        .filter(|(pattern, _)| !pattern.is_empty())
        .ok_or_else(|| Error::misuse(format!("{text:?} is not REGEX=METHOD, such as ffn_down=gptq")))?;
    let way = Way::parse(name)?;
    let regex = RegexBuilder::new(pattern)
        .case_insensitive(true)
        .build()
        .map_err(|e| Error::misuse(format!("{pattern:?} is no regular expression: {e}")))?;
    Ok((regex, way))
}

impl MethodChoice {
    /// All that may be used.
    fn ways(&self) -> impl Iterator<Item = Way> + '_ {
        self.by_tensor.iter().map(|(_, way)| *way).chain(self.by_rule.iter().copied()).chain(self.others)
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.ways().next().is_none()
    }

    /// The method that needs moments which are not given, if there is one.
    pub fn lacks_moments(&self, has_imatrix: bool) -> Option<&'static str> {
        if self.moments.is_some() {
            return None;
        }
        if self.fold == Some(Folding::Search) {
            return Some(AWQ);
        }
        let needs = |way: &Way| match way {
            Way::Rtn => false,
            Way::Imatrix => !has_imatrix,
            Way::Method(_) => true,
        };
        self.ways().find(needs).map(Way::name)
    }

    /// With options for the methods that have them.
    ///
    /// # Errors
    /// `Misuse` for an option that none of them has.
    pub fn tuned(mut self, tuning: &Tuning) -> Result<Self> {
        let mut unused: Vec<&str> = tuning.names().collect();
        let ways = self.by_tensor.iter_mut().map(|(_, way)| way).chain(&mut self.others);
        for way in ways {
            if let Way::Method(method) = way {
                let rest: Vec<&str> = method.tune(tuning).names().collect();
                unused.retain(|option| rest.contains(option));
            }
        }
        match unused.first() {
            Some(option) => Err(Error::misuse(format!("--{option} has no effect on these methods"))
                .hint("--lr and --batch are for adaround; trainable and ternary know the best step")),
            None => Ok(self),
        }
    }

    fn check(&self, has_imatrix: bool) -> Result<()> {
        match self.lacks_moments(has_imatrix) {
            Some("imatrix") => Err(Error::misuse("method imatrix needs an importance").hint(
                "give an importance matrix with --imatrix FILE, or second moments with --moments FILE",
            )),
            Some(name) => Err(Error::misuse(format!("method {name} needs second moments"))
                .hint("make them with qconv calibrate MODEL -o FILE, and give them with --moments FILE")),
            None => Ok(()),
        }
    }
}

impl Rounding {
    /// How it is called where methods are chosen.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nearest | Self::Even => "rtn",
            Self::Weighed(_) => "imatrix",
            Self::Guided(guide) => guide.method.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_matches_counts() {
        let by_tensor =
            ["attn_v=rtn", r"blk\.0\.=imatrix", "ATTN=gptq"].map(|t| parse_tensor_method(t).unwrap());
        let choice = MethodChoice {
            by_tensor: by_tensor.into(),
            others: Some(Way::Imatrix),
            ..MethodChoice::default()
        };
        let guiding = Guiding { choice, moments: None };
        for (name, way) in [
            ("blk.0.attn_v.weight", "rtn"),
            ("blk.0.attn_q.weight", "imatrix"),
            ("blk.1.attn_q.weight", "gptq"),
            ("blk.1.ffn_up.weight", "imatrix"),
        ] {
            assert_eq!(guiding.way(name, None).unwrap().name(), way, "{name}");
        }
        assert_eq!(guiding.choice.lacks_moments(true), Some("gptq"));
        let tuned = |lr| guiding.choice.clone().tuned(&Tuning { lr, ..Tuning::default() });
        assert!(tuned(None).is_ok() && tuned(Some(0.1)).is_err());
        for bad in ["", "gptq", "=gptq", "a=b", "(=rtn"] {
            assert!(parse_tensor_method(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn awq_is_named_before_what_rounds() {
        let parse = |name| parse_method(name).map(|(fold, way)| (fold.is_some(), way.name())).ok();
        assert_eq!(parse("awq"), Some((true, "imatrix")));
        assert_eq!(parse("awq+gptq"), Some((true, "gptq")));
        assert_eq!(parse("awq+rtn"), Some((true, "rtn")));
        assert_eq!(parse("gptq"), Some((false, "gptq")));
        for bad in ["awq+", "awqgptq", "gptq+awq", "awq+awq", "awq+gptq+rtn", "AWQ"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert!(parse_tensor_method("ffn=awq").unwrap_err().hint_text().unwrap().contains("awq+gptq"));
        assert_eq!(strip_awq("awq_q4_0"), Some("q4_0"));
        assert_eq!(strip_awq("AWQ_F16"), Some("F16"));
        assert_eq!(strip_awq("q4_0"), None);
        let choice = MethodChoice { fold: Some(Folding::Search), ..MethodChoice::default() };
        assert_eq!(choice.lacks_moments(true), Some("awq"));
    }
}
