//! SentencePiece's tokenizer.model: the protobuf messages, as far as they matter here.
//!
//! Field numbers: `sentencepiece_model.proto` of SentencePiece.

use prost::Message;
use prost::encoding::decode_varint;

/// The whole file.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<SentencePiece>,
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    pub normalizer_spec: Option<NormalizerSpec>,
}

/// One token. Bytes instead of a string: invalid UTF-8 is for the caller to judge.
#[derive(Clone, PartialEq, Message)]
pub struct SentencePiece {
    #[prost(bytes = "vec", optional, tag = "1")]
    pub piece: Option<Vec<u8>>,
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    /// The numbers of [`super::TokenType`]; absent means normal.
    #[prost(int32, optional, tag = "3")]
    pub kind: Option<i32>,
}

/// How the model was trained.
#[derive(Clone, PartialEq, Message)]
pub struct TrainerSpec {
    /// 1 Unigram, 2 BPE, 3 word, 4 char; absent means Unigram.
    #[prost(int32, optional, tag = "3")]
    pub model_type: Option<i32>,
    #[prost(int32, optional, tag = "4")]
    pub vocab_size: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    pub unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    pub bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    pub eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pub pad_id: Option<i32>,
    #[prost(string, optional, tag = "45")]
    pub unk_piece: Option<String>,
    #[prost(string, optional, tag = "46")]
    pub bos_piece: Option<String>,
    #[prost(string, optional, tag = "47")]
    pub eos_piece: Option<String>,
    #[prost(string, optional, tag = "48")]
    pub pad_piece: Option<String>,
}

/// What is done to a text first. The flags are true when absent.
#[derive(Clone, PartialEq, Message)]
pub struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    pub add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub escape_whitespaces: Option<bool>,
}

/// `TrainerSpec::model_type` of BPE.
pub const BPE: i32 = 2;
/// `TrainerSpec::model_type` of Unigram.
pub const UNIGRAM: i32 = 1;

/// How many pieces a file holds, without making them: two bytes can stand for forty. `None` for what is no sequence
/// of fields as SentencePiece writes them.
pub fn count_pieces(mut bytes: &[u8]) -> Option<u64> {
    /// Wire types of protobuf: a number, 8 bytes, bytes with their length, 4 bytes. Groups are of old times.
    const NUMBER: u64 = 0;
    const EIGHT: u64 = 1;
    const BYTES: u64 = 2;
    const FOUR: u64 = 5;
    let mut n = 0;
    while !bytes.is_empty() {
        let tag = decode_varint(&mut bytes).ok()?;
        let len = match tag & 7 {
            NUMBER => {
                decode_varint(&mut bytes).ok()?;
                0
            }
            EIGHT => 8,
            BYTES => decode_varint(&mut bytes).ok()?,
            FOUR => 4,
            _ => return None,
        };
        n += u64::from(tag >> 3 == 1);
        bytes = bytes.get(usize::try_from(len).ok()?..)?;
    }
    Some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_counted() {
        let piece = SentencePiece { piece: Some(b"a".to_vec()), score: Some(1.0), kind: None };
        let spec = TrainerSpec { model_type: Some(BPE), ..Default::default() };
        let model = ModelProto { pieces: vec![piece; 3], trainer_spec: Some(spec), normalizer_spec: None };
        let bytes = model.encode_to_vec();
        assert_eq!(count_pieces(&bytes), Some(3));
        assert_eq!(count_pieces(&bytes[..bytes.len() - 1]), None);
        assert_eq!(count_pieces(b"\x0b\x0c"), None);
        assert_eq!(count_pieces(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), None);
    }
}
