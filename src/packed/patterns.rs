//! Patterns for names of modules, which configs of models are full of: Python's regular expressions.
//!
//! Who wrote them is unknown, so what they cost is bounded. One that is text apart from its dots is compared as text.
//! Any other becomes an automaton whose states are made as names ask for them, and no more states than a budget
//! allows: a name is then gone through in time proportional to its length. Text, programs and states of all
//! patterns of a config are counted together. Names are ASCII in practice: `\d`, `\w` and `(?i)` know no more.

use std::cell::{Cell, RefCell};

use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson::{NFA, WhichCaptures};
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};

use crate::error::{Error, Result};

/// Most patterns of a config.
const MOST: usize = 1 << 12;
/// Most of those that are more than text.
const MOST_COMPILED: usize = 1 << 10;
/// Most bytes of the text of one that is, and of all of these.
const TEXT: usize = 4 << 10;
const TEXTS: usize = 128 << 10;
/// Most bytes of a program, and of all.
const PROGRAM: usize = 64 << 10;
const PROGRAMS: usize = 4 << 20;
/// Most bytes of the states of a pattern, and of those of all.
const STATES: usize = 128 << 10;
const ALL_STATES: usize = 8 << 20;

/// Where in a name a pattern has to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// At its beginning, as `re.match(PATTERN, name)`.
    Start,
    /// At its end, whole modules: as `re.match(r"(.*\.)?(PATTERN)$", name)`.
    Modules,
}

/// The patterns of a config.
pub struct Patterns {
    at: At,
    patterns: Vec<Pattern>,
    compiled: usize,
    texts: usize,
    programs: usize,
    states: Cell<usize>,
}

enum Pattern {
    /// Characters; `None` is any.
    Text(Vec<Option<char>>),
    Automaton(Box<Automaton>),
}

struct Automaton {
    text: String,
    dfa: DFA,
    cache: RefCell<Option<Cache>>,
}

impl Patterns {
    /// No patterns yet.
    pub fn new(at: At) -> Self {
        Self { at, patterns: Vec::new(), compiled: 0, texts: 0, programs: 0, states: Cell::new(0) }
    }

    /// Adds one, which from now on goes by its number: they count from 0.
    ///
    /// # Errors
    /// `Unsupported` where it is none, or one that only Python knows; `Limit`.
    pub fn add(&mut self, pattern: &str) -> Result<()> {
        if self.patterns.len() == MOST {
            return Err(Error::limit(format!("there are more than {MOST} patterns")));
        }
        let pattern = match plain(pattern) {
            Some(text) => Pattern::Text(text),
            None => Pattern::Automaton(Box::new(self.compile(pattern)?)),
        };
        self.patterns.push(pattern);
        Ok(())
    }

    fn compile(&mut self, pattern: &str) -> Result<Automaton> {
        self.compiled += 1;
        self.texts += pattern.len();
        if pattern.len() > TEXT {
            return Err(Error::limit(format!(
                "a pattern has {} bytes, at most {TEXT} are allowed",
                pattern.len()
            )));
        }
        if self.compiled > MOST_COMPILED || self.texts > TEXTS {
            return Err(Error::limit(format!(
                "more than {MOST_COMPILED} patterns are no plain names, or these have more than {TEXTS} bytes"
            )));
        }
        let whole = match self.at {
            At::Start => format!("(?:{pattern})"),
            At::Modules => format!(r"(?:.*\.)?(?:{pattern})$"),
        };
        let config = NFA::config().nfa_size_limit(Some(PROGRAM)).which_captures(WhichCaptures::None);
        let mut compiler = NFA::compiler();
        compiler.configure(config.utf8(false)).syntax(syntax::Config::new().unicode(false).utf8(false));
        let nfa = compiler.build(&whole).map_err(|e| match e.size_limit() {
            Some(_) => too_large(pattern),
            None => Error::unsupported(format!("pattern {pattern:?} is not read: {e}")),
        })?;
        self.programs += nfa.memory_usage();
        if self.programs > PROGRAMS {
            return Err(too_large(pattern));
        }
        let config = DFA::config()
            .cache_capacity(STATES)
            .skip_cache_capacity_check(true)
            // It is full once, and then it is too much.
            .minimum_cache_clear_count(Some(0));
        let dfa = DFA::builder()
            .configure(config)
            .build_from_nfa(nfa)
            .map_err(|e| Error::unsupported(format!("pattern {pattern:?} is not read: {e}")))?;
        Ok(Automaton { text: pattern.into(), dfa, cache: RefCell::new(None) })
    }

    /// The number of the first that is found in `name`, of those below `end`.
    ///
    /// # Errors
    /// `Limit` for one that takes too many states.
    pub fn first(&self, name: &str, end: usize) -> Result<Option<usize>> {
        for (i, pattern) in self.patterns.iter().take(end).enumerate() {
            let found = match pattern {
                Pattern::Text(text) => is_text(text, self.at, name),
                Pattern::Automaton(automaton) => self.run(automaton, name)?,
            };
            if found {
                return Ok(Some(i));
            }
        }
        Ok(None)
    }

    fn run(&self, automaton: &Automaton, name: &str) -> Result<bool> {
        let mut cache = automaton.cache.borrow_mut();
        let before = cache.as_ref().map_or(0, Cache::memory_usage);
        let cache = cache.get_or_insert_with(|| automaton.dfa.create_cache());
        let input = Input::new(name).anchored(Anchored::Yes).earliest(true);
        let found = automaton.dfa.try_search_fwd(cache, &input);
        self.states.set(self.states.get() + cache.memory_usage().saturating_sub(before));
        match found {
            Ok(found) if self.states.get() <= ALL_STATES => Ok(found.is_some()),
            _ => Err(too_large(&automaton.text)),
        }
    }
}

fn too_large(pattern: &str) -> Error {
    Error::limit(format!("pattern {pattern:?} is too large, or takes too many steps"))
        .hint("plain names of modules take none")
}

/// The pattern, where it is text but for dots.
fn plain(pattern: &str) -> Option<Vec<Option<char>>> {
    let mut text = Vec::with_capacity(pattern.len());
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        text.push(match c {
            '.' => None,
            '\\' => Some(chars.next().filter(|c| matches!(c, '.' | '-'))?),
            c if c.is_alphanumeric() || "_-/: ".contains(c) => Some(c),
            _ => return None,
        });
    }
    Some(text)
}

fn is_text(text: &[Option<char>], at: At, name: &str) -> bool {
    let is = |(want, c): (&Option<char>, char)| want.map_or(c != '\n', |want| want == c);
    match at {
        At::Start => {
            let mut chars = name.chars();
            text.iter().all(|want| chars.next().is_some_and(|c| is((want, c))))
        }
        At::Modules => {
            let mut chars = name.chars();
            text.iter().rev().all(|want| chars.next_back().is_some_and(|c| is((want, c))))
                && matches!(chars.next_back(), None | Some('.'))
                && !chars.as_str().contains('\n')
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn patterns(at: At, all: &[&str]) -> Result<Patterns> {
        let mut patterns = Patterns::new(at);
        all.iter().try_for_each(|p| patterns.add(p))?;
        Ok(patterns)
    }

    fn kind(all: &[&str], name: &str) -> Option<ErrorKind> {
        patterns(At::Start, all).and_then(|p| p.first(name, all.len())).err().map(|e| e.kind())
    }

    #[test]
    fn names_as_python_finds_them() {
        let name = "model.layers.10.self_attn.q_proj";
        for (pattern, start, modules) in [
            ("q_proj", false, true),
            ("_proj", false, false),
            ("self_attn.q_proj", false, true),
            ("self_attn\\.q_proj", false, true),
            ("self-attn.q_proj", false, false),
            ("self.attn.q_proj", false, true),
            ("model.layers.1", true, false),
            ("model", true, false),
            ("", true, false),
            (name, true, true),
            ("model.layers.10.self_attn.q_proj.", false, false),
            (".*q_proj", true, true),
            (".*q_proj$", true, true),
            ("^model", true, false),
            ("^model.*", true, true),
            (r"layers\.\d+\.self_attn\.[qk]_proj", false, true),
            (r"layers\.(1|2)\.", false, false),
            ("k_proj|q_proj", false, true),
            ("(?i)MODEL", true, false),
            (r".*\bq_proj\b", true, true),
        ] {
            for (at, found) in [(At::Start, start), (At::Modules, modules)] {
                let p = patterns(at, &[pattern]).unwrap();
                assert_eq!(p.first(name, 1).unwrap(), found.then_some(0), "{pattern:?} {at:?}");
                // Text and automaton are one.
                let as_regex = format!("(?:{pattern})");
                let p = patterns(at, &[&as_regex]).unwrap();
                assert_eq!(p.first(name, 1).unwrap(), found.then_some(0), "{as_regex:?} {at:?}");
            }
        }
        let p = patterns(At::Start, &["x", ".*q_proj", "model"]).unwrap();
        assert_eq!([p.first(name, 3).unwrap(), p.first(name, 1).unwrap()], [Some(1), None]);
    }

    #[test]
    fn many_that_are_ordinary_fit() {
        let plain: Vec<String> = (0..4000).map(|i| format!("model.layers.{i}.mlp.down_proj")).collect();
        let plain: Vec<&str> = plain.iter().map(String::as_str).collect();
        assert_eq!(kind(&plain, "model.layers.7.q"), None);
        let classes: Vec<String> = (0..300)
            .map(|i| format!(r".*\.layers\.{i}\.mlp\.experts\.(\d+|shared)\.(gate|up|down)_pro\w$"))
            .collect();
        let classes: Vec<&str> = classes.iter().map(String::as_str).collect();
        let p = patterns(At::Start, &classes).unwrap();
        for i in 0..300 {
            let name = format!("model.layers.{i}.mlp.experts.{}.gate_proj", i * 7 % 256);
            assert_eq!(p.first(&name, classes.len()).unwrap(), Some(i));
        }
    }

    #[test]
    fn what_they_cost_is_bounded() {
        let mut state = 1u32;
        let irregular: String = (0..20_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if state >> 31 == 0 { 'a' } else { 'b' }
            })
            .collect();
        let text =
            |n: usize, pattern: &dyn Fn(usize) -> String| -> Vec<String> { (0..n).map(pattern).collect() };
        for (case, all, name) in [
            ("programs", text(2000, &|i| format!("[^a]{{300}}{i}")), "x"),
            ("nested", text(1, &|_| "((a{1000}){1000}){1000}".into()), "x"),
            ("one text", text(1, &|_| "\\w{0}".repeat(1000)), "x"),
            ("texts", text(900, &|i| format!("{}{i}", "(?:)".repeat(50))), "x"),
            ("number", text(5000, &|i| format!("x{i}")), "x"),
            ("number compiled", text(1100, &|i| format!("x{i}*")), "y"),
            ("states", text(1, &|_| "[a-z]*a[a-z]{15}Z".into()), irregular.as_str()),
        ] {
            let all: Vec<&str> = all.iter().map(String::as_str).collect();
            assert_eq!(kind(&all, name), Some(ErrorKind::Limit), "{case}");
        }
        assert_eq!(kind(&["("], "x"), Some(ErrorKind::Unsupported));
        assert_eq!(kind(&["(?=a)"], "x"), Some(ErrorKind::Unsupported));
    }
}
