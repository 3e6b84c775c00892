//! The parts of a model's name, by llama.cpp's heuristics: base, size, fine-tune, version.
//! Source of the rules: `get_model_id_components` in gguf-py's `metadata.py`.

use std::sync::LazyLock;

use regex::Regex;

static VERSION: LazyLock<Regex> = LazyLock::new(|| regex(r"(?i)^(?:v|iter)?\d+(?:[.]\d+)*$"));
static TYPE: LazyLock<Regex> = LazyLock::new(|| regex(r"(?i)^(?:i?q\d(?:_\w)*|b?fp?(?:16|32))$"));
static SIZE: LazyLock<Regex> = LazyLock::new(|| {
    regex(r"(?i)^(?:(?:(?:[A]|\d+[x])?\d+(?:[._]\d+)?[KMBT][\d]?)|small|mini|medium|large|x?xl)$")
});
static KIND: LazyLock<Regex> = LazyLock::new(|| regex(r"(?i)^(?:chat|instruct|vision|lora)$"));
static AS_IT_IS: LazyLock<Regex> = LazyLock::new(|| regex(r"^(?:v\d+(?:\.\d+)*|\d.*)$"));

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern that a test compiles")
}

/// `my-model-v2` -> `My Model v2`: words in lower case get a capital, versions and acronyms stay.
pub(super) fn title(id: &str) -> String {
    let capital = |w: &str| {
        let lower = w.chars().any(char::is_lowercase) && !w.chars().any(char::is_uppercase);
        if !lower || AS_IT_IS.is_match(w) {
            return w.to_string();
        }
        // Every run of letters begins with a capital, as Python's str.title() has it.
        let mut after_letter = false;
        w.chars()
            .flat_map(|c| {
                let first = c.is_alphabetic() && !after_letter;
                after_letter = c.is_alphabetic();
                if first { c.to_uppercase().collect::<Vec<_>>() } else { vec![c] }
            })
            .collect()
    };
    id.trim().replace('-', " ").split_whitespace().map(capital).collect::<Vec<_>>().join(" ")
}

/// The parts of a name such as `meta-llama/Llama-2-7b-chat-hf`.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ModelId {
    pub name: Option<String>,
    pub organization: Option<String>,
    pub basename: Option<String>,
    pub finetune: Option<String>,
    pub version: Option<String>,
    pub size_label: Option<String>,
}

#[derive(Clone, Default)]
struct Part {
    text: String,
    base: bool,
    size: bool,
    finetune: bool,
    version: bool,
    kind: bool,
}

impl Part {
    fn labels(&self) -> u32 {
        [self.base, self.size, self.finetune, self.version, self.kind].into_iter().map(u32::from).sum()
    }
}

impl ModelId {
    /// `total` is the number of weights, by which a size such as `7B` is told from a context
    /// length such as `128k`; 0 when unknown.
    pub fn parse(id: &str, total: u64) -> Self {
        if id.is_empty() {
            return Self::default();
        }
        if id.contains(' ') {
            return Self { name: Some(id.into()), ..Self::default() };
        }
        let (organization, name) = match id.split_once('/') {
            Some((o, n)) => (Some(o).filter(|o| !o.starts_with('.')), n),
            None => (None, id),
        };
        let mut parts: Vec<Part> = name
            .split('-')
            .filter(|p| !p.is_empty())
            .map(|p| Part { text: p.into(), ..Part::default() })
            .collect();
        for (i, part) in parts.iter_mut().enumerate() {
            part.label(i, total);
        }
        let digits = |p: &Part| p.text.chars().any(|c| c.is_ascii_digit());
        if parts.iter().any(|p| p.size && digits(p)) {
            // "small" says nothing beside "7B".
            for p in parts.iter_mut().filter(|p| p.size && p.text.chars().all(char::is_alphabetic)) {
                p.size = false;
            }
        }
        let mut at_start = true;
        for p in &mut parts {
            let plain = p.labels() == 0;
            if at_start && ((plain && p.text.starts_with(char::is_alphabetic)) || p.version) {
                p.base = true;
            } else {
                at_start = false;
                p.finetune |= plain;
            }
        }
        for p in parts.iter_mut().rev() {
            if p.base && p.labels() > 1 {
                p.base = false;
            } else {
                break;
            }
        }
        let join = |pick: &dyn Fn(&Part) -> bool| {
            let texts: Vec<&str> = parts.iter().filter(|p| pick(p)).map(|p| p.text.as_str()).collect();
            (!texts.is_empty()).then(|| texts.join("-"))
        };
        let mut sizes: Vec<&str> = Vec::new();
        for p in parts.iter().filter(|p| p.size) {
            if !sizes.contains(&p.text.as_str()) {
                sizes.push(&p.text);
            }
        }
        let size_label = (!sizes.is_empty()).then(|| sizes.join("-"));
        let finetune = join(&|p| p.finetune);
        let version = join(&|p| p.version && !p.base);
        // A bare word could mean anything.
        let ambiguous = size_label.is_none() && finetune.is_none() && version.is_none();
        Self {
            name: Some(name.into()),
            organization: organization.map(String::from),
            basename: join(&|p| p.base).filter(|_| !ambiguous),
            finetune,
            version,
            size_label,
        }
    }
}

impl Part {
    fn label(&mut self, position: usize, total: u64) {
        if VERSION.is_match(&self.text) {
            self.version = true;
        } else if TYPE.is_match(&self.text) {
            self.kind = true;
            self.text = self.text.to_uppercase();
        } else if position > 0 && SIZE.is_match(&self.text) {
            self.label_size(total);
        } else if position > 0 && KIND.is_match(&self.text) {
            self.finetune = true;
        }
    }

    fn label_size(&mut self, total: u64) {
        // The pattern matched: all is ASCII.
        let mut text: Vec<u8> = self.text.replace('_', ".").into_bytes();
        let n = text.len();
        if n >= 3 && text[n - 1].is_ascii_digit() {
            // 7b1 is 7.1b
            let (unit, digit) = (text[n - 2], text[n - 1]);
            text.truncate(n - 2);
            text.extend([b'.', digit, unit]);
        }
        let n = text.len();
        if n > 1 && text[n - 2].is_ascii_digit() && b"kmbt".contains(&text[n - 1]) {
            text[n - 1].make_ascii_uppercase();
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let (number, unit) = text.split_at(text.len() - 1);
        let thousands = "KMBT".find(unit).map(|k| k as i32 + 1);
        self.text = text.clone();
        self.size = true;
        if let (Ok(number), Some(k)) = (number.parse::<f64>(), thousands)
            && total > 0
            && (number * 1000f64.powi(k) - total as f64).abs() > (7 * total / 8) as f64
        {
            // Far from the model's size: likely a context length.
            self.size = false;
            self.finetune = true;
            self.text.replace_range(text.len() - 1.., &unit.to_lowercase());
        }
    }
}
