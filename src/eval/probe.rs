//! The text that token parity is measured on.

use tokenizers::{AddedToken, Tokenizer};

/// Special tokens probed each by itself.
const SPECIAL_TOKENS: usize = 512;
/// Special tokens probed between words as well.
const SPECIAL_TOKENS_IN_TEXT: usize = 32;
/// Entries of the vocabulary whose text is probed.
const ENTRIES: usize = 4096;
/// Entries joined in one probe.
const ENTRIES_PER_PROBE: usize = 32;

/// Pieces of many languages, kinds of code and kinds of white space. Each is tokenized by itself,
/// and all of them joined.
const TEXTS: &[&str] = &[
    // English, and what splits words.
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said it's what we'd've done; you're right, I'll go. He can't, won't, shan't.",
    "I'M SURE THEY'VE SAID IT'S WHAT WE'D DONE; YOU'RE RIGHT, I'LL GO. CAN'T, WON'T.",
    "'s 't 're 've 'm 'll 'd 'S 'T 'RE 'VE 'M 'LL 'D ''s x's9 9's \u{2019}s \u{2018}tis",
    "camelCase snake_case kebab-case SCREAMING_CASE PascalCase iPhone McDonald's O'Neill",
    "e.g. i.e. U.S.A. a.m./p.m. Mr. Smith's Ph.D. vs. the rest... (see p. 12ff.) [sic] {x} <y>",
    "Wait... what?! No!!! \"Quoted\" 'single' \u{201c}curly\u{201d} \u{ab}guillemets\u{bb} \u{2014} dash \u{2013} en",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G",
    "supercalifragilisticexpialidocious antidisestablishmentarianism aaaaaaaaaaaaaaaaaaaaaaaa",
    // Digits.
    "1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159 1,000,000 1e-10 0x7fFF 0b1010 1_000 50% $9.99 \u{20ac}5 \u{a3}3 2024-02-29T23:59:59Z v1.2.3",
    "a1b22c333d4444e 1st 2nd 3rd 10th x1 1x 192.168.0.1 +1 (555) 010-9999 #42 \u{bd} \u{2460} \u{b2} \u{2167}",
    "\u{661}\u{662}\u{663}\u{664}\u{665} \u{967}\u{968}\u{969}\u{96a} \u{ff11}\u{ff12}\u{ff13} \u{0e51}\u{0e52}\u{0e53}",
    // White space.
    "a  b   c    d     e      f       g        h                i",
    " leading",
    "  leading",
    "   leading",
    "trailing ",
    "trailing  ",
    "trailing   ",
    " ",
    "  ",
    "    ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    " \n",
    "\n ",
    "\t\n\t ",
    " \n \n ",
    "a\tb\t\tc\t\t\td",
    "line one\nline two\n\nline four\n\n\n\nline eight\n",
    "dos line one\r\ndos line two\r\n\r\ndos line four\r\n",
    "old\rmac\r\rlines",
    "spaces before newline   \nnext\t\nnext \t \n  indented\n\tindented\n \t mixed",
    "word.\n\nNew paragraph!\n- item\n  - nested\n    1. deeper\n",
    "no\u{a0}break \u{3000}ideographic",
    // Code.
    "fn main() {\n    let x: Vec<u8> = vec![0; 16];\n    println!(\"{:?}\", x);\n}\n",
    "def f(x, *args, **kwargs):\n\treturn {k: v for k, v in kwargs.items() if v is not None}  # why?\n",
    "for (int i=0;i<n;++i){a[i]=b[i]*c[i]+0.5f;}/* comment */ #include <stdio.h>\n",
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x''y' -- comment\n; <a href=\"https://x.org/?q=1&r=2#f\">",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\\n\": \"\\u00e9\"}} $HOME/.config/*.toml \\frac{1}{2}",
    "if (x != y && !z || ~w) { return x ? y : z; } // ==> <=> :: -> => .. ... ..= |> <- ++ -- += **",
    // Latin with diacritics, composed and not.
    "na\u{ef}ve caf\u{e9} r\u{e9}sum\u{e9} \u{fc}ber Stra\u{df}e \u{c5}ngstr\u{f6}m \u{130}stanbul \u{131}\u{15f}\u{131}k \u{141}\u{f3}d\u{17a} ma\u{f1}ana",
    "Vi\u{1ec7}t Nam \u{111}\u{1ea5}t n\u{1b0}\u{1edb}c, ti\u{1ebf}ng n\u{f3}i c\u{1ee7}a ch\u{fa}ng ta",
    "cafe\u{301} nai\u{308}ve A\u{30a} o\u{302}\u{301} z\u{334}\u{353}a\u{335}l\u{336}g\u{337}o\u{338}",
    // Other scripts.
    "\u{41f}\u{440}\u{438}\u{432}\u{435}\u{442}, \u{43c}\u{438}\u{440}! \u{401}\u{436}\u{438}\u{43a} \u{438} \u{432}\u{44a}\u{435}\u{437}\u{434}.",
    "\u{39a}\u{3b1}\u{3bb}\u{3b7}\u{3bc}\u{3ad}\u{3c1}\u{3b1} \u{3ba}\u{3cc}\u{3c3}\u{3bc}\u{3b5}, \u{3c4}\u{3af} \u{3ba}\u{3ac}\u{3bd}\u{3b5}\u{3b9}\u{3c2};",
    "\u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{5e2}\u{5d5}\u{5dc}\u{5dd}, \u{5de}\u{5d4} \u{5e9}\u{5dc}\u{5d5}\u{5de}\u{5da}?",
    "\u{645}\u{631}\u{62d}\u{628}\u{627} \u{628}\u{627}\u{644}\u{639}\u{627}\u{644}\u{645}\u{60c} \u{643}\u{64a}\u{641} \u{62d}\u{627}\u{644}\u{643}\u{61f} \u{627}\u{644}\u{644}\u{651}\u{63a}\u{629}",
    "\u{928}\u{92e}\u{938}\u{94d}\u{924}\u{947} \u{926}\u{941}\u{928}\u{93f}\u{92f}\u{93e}, \u{915}\u{94d}\u{92f}\u{93e} \u{939}\u{93e}\u{932} \u{939}\u{948}? \u{0964}",
    "\u{9ac}\u{9be}\u{982}\u{9b2}\u{9be} \u{0ba4}\u{0bae}\u{0bbf}\u{0bb4}\u{0bcd} \u{0c24}\u{0c46}\u{0c32}\u{0c41}\u{0c17}\u{0c41}",
    "\u{0e2a}\u{0e27}\u{0e31}\u{0e2a}\u{0e14}\u{0e35}\u{0e0a}\u{0e32}\u{0e27}\u{0e42}\u{0e25}\u{0e01} \u{0e17}\u{0e35}\u{0e48}\u{0e19}\u{0e35}\u{0e48}",
    "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c}\u{ff01}\u{6211}\u{4eec}\u{53bb}\u{5317}\u{4eac}\u{3002}2024\u{5e74}1\u{6708}",
    "\u{3053}\u{3093}\u{306b}\u{3061}\u{306f}\u{4e16}\u{754c}\u{3001}\u{30ab}\u{30bf}\u{30ab}\u{30ca}\u{30fc}\u{3068}\u{6f22}\u{5b57}\u{3002}\u{ff76}\u{ff85}",
    "\u{c548}\u{b155}\u{d558}\u{c138}\u{c694} \u{c138}\u{acc4}, \u{d55c}\u{ad6d}\u{c5b4}\u{c785}\u{b2c8}\u{b2e4}.",
    "\u{10d2}\u{10d0}\u{10db}\u{10d0}\u{10e0}\u{10ef}\u{10dd}\u{10d1}\u{10d0} \u{532}\u{561}\u{580}\u{587} \u{1230}\u{120b}\u{121d} \u{1798}\u{17bd}\u{1799}",
    "\u{20000}\u{2a6d6} \u{1d400}\u{1d401}\u{1d402} \u{10330}\u{10331}",
    // Emoji: plain, skin tone, joined, flag, keycap, text style.
    "\u{1f600} \u{1f44b}\u{1f3fd} \u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}\u{200d}\u{1f466} \u{1f3f3}\u{fe0f}\u{200d}\u{1f308} \u{1f1eb}\u{1f1f7} 1\u{fe0f}\u{20e3} \u{2764}\u{fe0f} x\u{1f680}y",
    // Signs, invisible characters, controls.
    "\u{2200}x\u{2208}\u{211d}: \u{221a}x\u{b2} \u{2264} \u{221e} \u{2248} \u{3c0} \u{b1} \u{d7} \u{f7} \u{2192} \u{2713} \u{2122} \u{a9} \u{b0}C \u{2030} \u{fb01}",
    "zero\u{200b}width\u{200c}non\u{200d}joiner soft\u{ad}hyphen \u{feff}bom \u{200e}ltr\u{200f}rtl",
    "\u{1}\u{2}\u{7}\u{8}\u{b}\u{c}\u{1b}[31m\u{7f} \u{fffd} \u{e000}",
    // What looks like a piece of a vocabulary.
    "\u{120}the \u{10a} \u{2581}the \u{2581}\u{2581} <0x0A> <0xE9> ##ing </w> [UNK] <unk> <s> </s> <pad>",
    "",
];

/// The tokens beside the model's own vocabulary, in order of id.
pub(super) fn added_tokens(tokenizer: &Tokenizer) -> Vec<AddedToken> {
    let mut tokens: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    tokens.sort_unstable_by_key(|(id, _)| *id);
    tokens.into_iter().map(|(_, token)| token).collect()
}

/// `n` of `items`, evenly spread, the first and the last among them.
fn spread<T>(items: &[T], n: usize) -> impl Iterator<Item = &T> {
    let n = n.min(items.len());
    let last = items.len().saturating_sub(1);
    (0..n).filter_map(move |i| items.get(if n > 1 { i * last / (n - 1) } else { 0 }))
}

/// All texts to compare.
pub(super) fn probes(tokenizer: &Tokenizer) -> Vec<String> {
    let mut probes: Vec<String> = TEXTS.iter().map(|&t| t.to_owned()).collect();
    probes.push(TEXTS.concat());
    probes.push(TEXTS.join(" "));
    for n in 1..=32 {
        probes.push(format!("a{}b", " ".repeat(n)));
        probes.push(format!("a{}b", "\n".repeat(n)));
        probes.push(format!("{}x", "\t".repeat(n)));
        probes.push("1234567890".repeat(4)[..n].to_owned());
    }
    let specials = added_tokens(tokenizer);
    for token in spread(&specials, SPECIAL_TOKENS) {
        probes.push(token.content.clone());
    }
    for token in spread(&specials, SPECIAL_TOKENS_IN_TEXT) {
        let t = &token.content;
        probes.extend([format!("a{t}b"), format!("Hello {t} world"), format!("{t}\nHello\n{t}{t} {t}  x")]);
    }
    // What the vocabulary's own entries say, so that a wrong entry anywhere near is found.
    let ids: Vec<u32> = (0..tokenizer.get_vocab_size(true)).filter_map(|id| id.try_into().ok()).collect();
    let entries: Vec<String> = spread(&ids, ENTRIES)
        .filter_map(|&id| tokenizer.decode(&[id], true).ok())
        .filter(|text| !text.is_empty() && !text.contains('\u{fffd}'))
        .collect();
    probes.extend(entries.chunks(ENTRIES_PER_PROBE).map(|chunk| chunk.join(" ")));
    probes.extend(entries.chunks(ENTRIES_PER_PROBE).map(<[String]>::concat));
    probes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_both_ends() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(spread(&items, 4).copied().collect::<Vec<_>>(), [0, 33, 66, 99]);
        assert_eq!(spread(&items, 1000).count(), 100);
        assert_eq!(spread(&items, 1).copied().collect::<Vec<_>>(), [0]);
        assert_eq!(spread(&items[..0], 4).count(), 0);
    }
}
