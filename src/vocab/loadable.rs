//! What ends the process in llama.cpp when it loads a vocabulary, found before it is asked to.

use std::collections::HashSet;

use super::{TokenType, charsmap};
use crate::container::gguf::{Array, Metadata, Value};
use crate::error::{Error, Result};

/// Refuses metadata over whose `tokenizer.*` entries llama.cpp would abort, or never come back (read in
/// `llama_vocab::impl::load` of the linked version). What it refuses by itself, with a message, passes.
///
/// # Errors
/// `Malformed`: tokens that appear twice, WordPiece with byte tokens, a compiled normalization that
/// leads outside itself, RWKV tokens from which no single byte is one.
pub fn check_loadable(metadata: &Metadata) -> Result<()> {
    let Some(model) = metadata.str("tokenizer.ggml.model").filter(|m| *m != "none" && *m != "no_vocab")
    else {
        return Ok(());
    };
    let Some(Value::Array(Array::String(tokens))) = metadata.get("tokenizer.ggml.tokens") else {
        return Ok(());
    };
    let mut seen: HashSet<Vec<u8>> = HashSet::with_capacity(tokens.len());
    for (id, text) in tokens.iter().enumerate() {
        // The name llama.cpp gives an empty token; after a NUL it reads no further.
        let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
        let name = match text.get(..end) {
            Some([]) | None => format!("[EMPTY_{id}]").into_bytes(),
            Some(text) => text.to_vec(),
        };
        if let Some(name) = seen.replace(name) {
            return Err(Error::malformed(format!(
                "token {id}, {:?}, appears twice in tokenizer.ggml.tokens",
                String::from_utf8_lossy(&name)
            ))
            .hint("llama.cpp cannot load such a vocabulary; convert the model anew"));
        }
    }
    match model {
        "bert" => {
            if let Some(Value::Array(Array::I32(types))) = metadata.get("tokenizer.ggml.token_type")
                && let Some(id) = types.iter().position(|t| *t == TokenType::Byte as i32)
            {
                return Err(Error::malformed(format!("token {id} of WordPiece is marked as a byte")));
            }
        }
        "t5" => match metadata.get("tokenizer.ggml.precompiled_charsmap") {
            Some(Value::Array(Array::U8(bytes))) => charsmap::check(bytes)?,
            Some(Value::Array(Array::I8(bytes))) => {
                charsmap::check(&bytes.iter().map(|b| *b as u8).collect::<Vec<_>>())?;
            }
            _ => {}
        },
        "rwkv" => {
            let tokens: Vec<Vec<u8>> = tokens.iter().map(|text| rwkv_bytes(text)).collect();
            let single: HashSet<u8> =
                tokens.iter().filter(|t| t.len() == 1).filter_map(|t| t.first().copied()).collect();
            let first = tokens.iter().filter_map(|t| t.first()).find(|b| !single.contains(b));
            if let Some(byte) = first {
                return Err(Error::malformed(format!(
                    "tokens begin with the byte {byte:#04x}, which is no token: llama.cpp would not come back from such a text"
                )));
            }
        }
        _ => {}
    }
    Ok(())
}

/// The bytes of an RWKV token, whose text is escaped as in Python.
fn rwkv_bytes(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.iter().copied();
    while let Some(byte) = rest.next() {
        let escaped = match byte {
            b'\\' => rest.next(),
            _ => {
                out.push(byte);
                continue;
            }
        };
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16)).unwrap_or(0) as u8;
        out.extend(match escaped {
            Some(b't') => Some(b'\t'),
            Some(b'n') => Some(b'\n'),
            Some(b'r') => Some(b'\r'),
            Some(b'x') => Some(digit(rest.next()) << 4 | digit(rest.next())),
            other => other,
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn check(model: &str, tokens: &[&str], key: &str, value: Value) -> Result<()> {
        let mut m = Metadata::default();
        m.set("tokenizer.ggml.model", model);
        let tokens = tokens.iter().map(|t| t.as_bytes().to_vec()).collect();
        m.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
        m.set(key, value);
        check_loadable(&m)
    }

    #[test]
    fn what_aborts_is_refused() {
        let none = || Value::Bool(true);
        let types = Value::Array(Array::I32(vec![1, 6]));
        let damaged = Value::Array(Array::U8(vec![9, 0, 0, 0, 1]));
        let bad = [
            check("gpt2", &["a", "b", "a"], "x", none()),
            check("llama", &["", "[EMPTY_0]"], "x", none()),
            check("llama", &["a\0b", "a\0c"], "x", none()),
            check("bert", &["a", "b"], "tokenizer.ggml.token_type", types.clone()),
            check("t5", &["a", "b"], "tokenizer.ggml.precompiled_charsmap", damaged),
            check("rwkv", &["a", "\\x0ab"], "x", none()),
        ];
        for result in bad {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Malformed);
        }
        assert!(check("gpt2", &["a", "b"], "tokenizer.ggml.token_type", types).is_ok());
        assert!(check("llama", &["", ""], "x", none()).is_ok());
        assert!(check("rwkv", &["\\n", "\\x0ab", "b"], "x", none()).is_ok());
        assert!(check("none", &["a", "a"], "x", none()).is_ok());
    }

    #[test]
    fn rwkv_escapes() {
        assert_eq!(rwkv_bytes(br"a\t\n\r\x00\xff\\\'"), b"a\t\n\r\x00\xff\\'");
        assert_eq!(rwkv_bytes(br"\x"), [0]);
    }
}
