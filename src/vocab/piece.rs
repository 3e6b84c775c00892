//! What tokens stand for in text.

use super::pre::byte_of_char;
use super::{Kind, TokenType, Vocab};

impl Vocab {
    /// The bytes that token `id` stands for in text; perhaps a part of a character only. Control tokens, the
    /// unknown token and padding have none. `None` for ids outside the vocabulary. As llama.cpp's
    /// `llama_token_to_piece` (`src/llama-vocab.cpp`) without special tokens.
    pub fn piece(&self, id: usize) -> Option<Vec<u8>> {
        let token = self.tokens.get(id)?;
        let text = String::from_utf8_lossy(token);
        Some(match (self.token_types.get(id)?, self.kind) {
            (TokenType::Unknown | TokenType::Control | TokenType::Unused, _) => Vec::new(),
            (TokenType::UserDefined, _) => token.clone(),
            (TokenType::Byte, _) => byte(&text).into_iter().collect(),
            (TokenType::Normal, Kind::Bpe) => {
                let mut bytes = Vec::with_capacity(token.len());
                for c in text.chars() {
                    match byte_of_char().get(&c) {
                        Some(byte) => bytes.push(*byte),
                        None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
                bytes
            }
            (TokenType::Normal, _) => text.replace('\u{2581}', " ").into_bytes(),
        })
    }
}

/// `<0x0A>`
fn byte(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_by_kind_and_type() {
        let of = |kind, tokens: &[(&str, TokenType)]| {
            let mut vocab = Vocab::new(kind, "");
            tokens.iter().for_each(|(text, t)| vocab.push(*text, *t, 0.0));
            (0..tokens.len()).map(|id| vocab.piece(id).unwrap()).collect::<Vec<_>>()
        };
        use TokenType::*;
        let tokens =
            [("▁a▁b", Normal), ("<0x0A>", Byte), ("<0xZZ>", Byte), ("</s>", Control), ("x▁", UserDefined)];
        assert_eq!(of(Kind::Spm, &tokens), [&b" a b"[..], b"\n", b"", b"", "x▁".as_bytes()]);
        let tokens = [("Ġa", Normal), ("Ã", Normal), ("€", Normal), ("[PAD3]", Unused), ("Ġ", UserDefined)];
        assert_eq!(of(Kind::Bpe, &tokens), [&b" a"[..], b"\xc3", "€".as_bytes(), b"", "Ġ".as_bytes()]);
        assert_eq!(Vocab::new(Kind::Bpe, "").piece(0), None);
    }
}
