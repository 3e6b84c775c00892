//! GGUF: the file's beginning, its end, strings, values and alignment.

use qconv::ErrorKind::{Limit, Malformed, Unsupported};

use super::{Cases, end_of_zip};
use crate::raw::{Raw, kind};

/// The valid file, and where its parts end.
pub fn valid() -> (Raw, usize) {
    let mut raw = Raw::valid();
    raw.data.truncate(DATA.next_multiple_of(32));
    (raw, DATA)
}

/// Bytes of the valid file's tensors, without the last one's padding.
const DATA: usize = 160 + 68;
/// Length of a beginning: magic, version, two counts.
const HEAD: usize = 24;

pub fn containers(t: &mut Cases) {
    let valid = || valid().0;
    let whole = valid().bytes();

    t.read("ok_v3", valid());
    t.read("ok_v2", Raw { version: 2, ..valid() });
    t.read("ok_no_tensors", Raw::llama());
    let mut wide = Raw::llama().u32("general.alignment", 64).info("a", &[16], 0, 0).info("b", &[16], 0, 64);
    wide.alignment = 64;
    t.read("ok_align64", wide.with_data(128));
    t.read("ok_empty_array", valid().strings("x.empty", &[]));
    t.read("ok_unknown_key", valid().entry("acme.custom", kind::U64, u64::MAX.to_le_bytes()));

    t.refuse("one_byte", &b"G"[..], Malformed, "file ends at byte 1");
    t.refuse("magic_only", &b"GGUF"[..], Malformed, "file ends at byte 4"); // CVE-2024-39720
    t.refuse("empty", &b""[..], Malformed, "file ends at byte 0");
    t.refuse("bad_magic_case", [b"gguf", &whole[4..]].concat(), Unsupported, "does not begin with \"GGUF\"");
    for (name, version, says) in [
        ("ver0", 0, "version 0 is too old"),
        ("ver1", 1, "version 1 is too old"),
        ("ver4", 4, "version 4 is newer"),
        ("ver_max", u32::MAX, "version 4294967295 is newer"),
    ] {
        t.refuse(name, Raw { version, ..valid() }, Unsupported, says);
    }
    let swapped = Raw { version: 3u32.swap_bytes(), ..valid() };
    t.refuse("ver_swapped_le_body", swapped, Malformed, "metadata entries at byte 24");
    let mut big = Raw { big_endian: true, ..Raw::empty() };
    big = big.text("general.architecture", "llama").u32("llama.block_count", 1).info("t", &[8], 0, 0);
    t.read("big_endian_valid", big.with_data(32)).policy("big-endian");

    // CVE-2024-21836, CVE-2024-23605: a count times a size wraps around.
    for (name, n) in [
        ("max", u64::MAX),
        ("2p63", 1 << 63),
        ("2p62", 1 << 62),
        ("2p40", 1 << 40),
        ("wrap_info", u64::MAX / 120 + 1),
        ("wrap_overhead", u64::MAX / 368 + 1),
    ] {
        let raw = Raw { tensor_count: Some(n), ..valid() };
        let says = format!("{n} tensor infos at byte 24");
        t.refuse(&format!("ntensors_{name}"), raw, Malformed, &says);
    }
    for (name, n) in [("max", u64::MAX), ("2p63", 1 << 63), ("2p40", 1 << 40), ("wrap", u64::MAX / 80 + 1)] {
        let raw = Raw { entry_count: Some(n), ..valid() };
        let says = format!("{n} metadata entries at byte 24");
        t.refuse(&format!("nkv_{name}"), raw, Malformed, &says);
    }
    // The first tensor's name is read as a key, its dimensions as a type and a value.
    let n = valid().entries.len() as u64 + 1;
    let one_more = Raw { entry_count: Some(n), ..valid() };
    t.refuse("nkv_plus1", one_more, Malformed, "bytes of string");
    let one_more = Raw { tensor_count: Some(4), ..valid() };
    t.refuse("ntensors_plus1", one_more, Malformed, "tensor 3");

    truncations(t, &whole);
    t.refuse_then_end(&whole);
}

/// One cut within each part of the file; `malformed_corpus.rs` has every one.
fn truncations(t: &mut Cases, whole: &[u8]) {
    let raw = valid().0;
    let (entries, infos): (usize, usize) = (raw.entries.concat().len(), raw.infos.concat().len());
    // The first entry: a key of 20 bytes, its type, a text of 5.
    let value_type = HEAD + 8 + 20;
    let info = HEAD + entries;
    let name = 8 + "token_embd.weight".len();
    let data = (info + infos).next_multiple_of(32);
    for (name, at) in [
        ("in_version", 6),
        ("after_version", 8),
        ("in_ntensors", 12),
        ("in_nkv", 20),
        ("after_header", HEAD),
        ("in_keylen", HEAD + 4),
        ("in_key", HEAD + 8 + 5),
        ("before_vtype", value_type),
        ("in_vtype", value_type + 2),
        ("in_strlen", value_type + 4 + 3),
        ("in_strval", value_type + 4 + 8 + 2),
        ("after_kvs", info),
        ("in_tname", info + 8 + 3),
        ("in_ndims", info + name + 2),
        ("in_dims", info + name + 4 + 8 + 1),
        ("before_ttype", info + name + 4 + 16),
        ("in_toffset", info + name + 4 + 16 + 4 + 3),
    ] {
        let says = format!("the file ends at byte {at}");
        t.refuse(&format!("trunc_{name}"), &whole[..at], Malformed, &says);
    }
    // The header is whole, its tensors are not there: CVE-2026-7482.
    for (name, at, tensor) in [
        ("after_infos", info + infos, "token_embd.weight"),
        ("in_padding", info + infos + 1, "token_embd.weight"),
        ("no_data", data, "token_embd.weight"),
        ("data_half", data + 100, "token_embd.weight"),
        ("data_minus1", data + DATA - 1, "blk.0.ffn_up.weight"),
    ] {
        let says = format!("tensor \"{tensor}\" takes");
        t.refuse(&format!("trunc_{name}"), &whole[..at], Malformed, &says);
    }
    t.read("trunc_final_pad", &whole[..data + DATA]).policy("last tensor's padding missing");
}

impl Cases {
    /// What lies where nothing should.
    fn refuse_then_end(&mut self, whole: &[u8]) {
        let polyglot = [whole, &end_of_zip()].concat();
        self.read("trailing_zip", polyglot).policy("bytes behind the last tensor");
        let mut padding = whole.to_vec();
        let data = whole.len() - DATA.next_multiple_of(32);
        assert_eq!(padding[data - 1], 0, "there is padding");
        padding[data - 1] = 0xaa;
        self.read("pad_nonzero", padding).policy("padding other than zero");
    }
}

pub fn values(t: &mut Cases) {
    strings(t);
    arrays(t);
    alignments(t);
}

fn strings(t: &mut Cases) {
    let (base, _) = valid();
    let valid = || base.clone();
    let beyond = base.bytes().len() as u64;
    // CVE-2024-23496
    for (name, n) in [
        ("max", u64::MAX),
        ("2p63", 1 << 63),
        ("2p32p5", (1 << 32) + 5),
        ("1gib", 1 << 30),
        ("eof_plus1", beyond),
    ] {
        let key = [&n.to_le_bytes()[..], b"general.architecture", &[8, 0, 0, 0]].concat();
        let key = Raw { entries: [vec![key], valid().entries[1..].to_vec()].concat(), ..valid() };
        let says = format!("metadata entry 0: {n} bytes of string at byte 32");
        t.refuse(&format!("keylen_{name}"), key, Malformed, &says);
        let value = [&n.to_le_bytes()[..], b"llama"].concat();
        let value = Raw::empty().entry("general.architecture", kind::STRING, value);
        let says = format!("metadata \"general.architecture\": {n} bytes of string at byte 64");
        t.refuse(&format!("strlen_{name}"), value, Malformed, &says);
    }
    t.refuse("key_empty", valid().u32("", 1), Malformed, "metadata key is empty");
    t.refuse("key_65536", valid().u32(&"k".repeat(65536), 1), Limit, "at most 65535 are allowed")
        .policy("key above 65,535 bytes");
    t.read("key_65535", valid().u32(&"k".repeat(65535), 1));
    let not_text = valid().entry(b"a\xff\xfeb", kind::U32, [0; 4]);
    t.refuse("key_nonutf8", not_text, Malformed, "the key of metadata entry 4 is not UTF-8");
    t.refuse("key_nul", valid().u32("general.name\0x", 1), Malformed, "\"general.name\\0x\" contains a NUL")
        .policy("key empty, not UTF-8, with NUL");
    t.read("key_upper", valid().u32("General.Name X", 1)).policy("key not in lower_snake_case");
    t.read("val_nul", valid().text("general.name", b"a\0b"));
    let twice = "metadata \"general.architecture\" appears twice";
    t.refuse("dup_key_same", valid().text("general.architecture", "llama"), Malformed, twice);
    t.refuse("dup_key_other", valid().text("general.architecture", "gpt2"), Malformed, twice);
}

fn arrays(t: &mut Cases) {
    let (base, _) = valid();
    let valid = || base.clone();
    for (name, id) in [("13", 13), ("max", u32::MAX), ("neg", 0x8000_0000)] {
        let says = format!("metadata \"x.y\": value type {id} does not exist");
        t.refuse(&format!("vtype_{name}"), valid().entry("x.y", id, [0; 8]), Malformed, &says);
    }
    // CVE-2024-21825; gguf-py #27188 hangs and takes all memory.
    for (name, element, n) in [
        ("u8_max", kind::U8, u64::MAX),
        ("u8_2p63", kind::U8, 1 << 63),
        ("u64_mulwrap", kind::U64, (1 << 61) + 1),
        ("u32_mulwrap", kind::U32, (1 << 62) + 1),
        ("str_2p60", kind::STRING, 1 << 60),
        ("str_1gi", kind::STRING, 1 << 30),
        ("f32_1gi", kind::F32, 1 << 30),
        ("plus1", kind::U32, 64),
        ("nested_len62", kind::ARRAY, 1 << 62),
    ] {
        let says = format!("metadata \"x.a\": {n} array elements at byte ");
        t.refuse(&format!("arr_{name}"), Raw::llama().array("x.a", element, n, [1; 64]), Malformed, &says);
    }
    let unknown = "metadata \"x.a\": value type 99 does not exist";
    t.refuse("arr_unknown_elem", valid().array("x.a", 99, 1, [0; 8]), Malformed, unknown);
    t.refuse("arr_unknown_elem_empty", valid().array("x.a", 99, 0, []), Malformed, unknown);
    t.refuse("arr_bool_bad", valid().array("x.b", kind::BOOL, 3, [0, 1, 7]), Malformed, "BOOL has value 7")
        .policy("BOOL other than 0 and 1");
    t.refuse("bool_bad", valid().entry("x.b", kind::BOOL, [2]), Malformed, "\"x.b\": BOOL has value 2");
    t.read("arr_str_nonutf8", valid().strings("x.s", &[b"ok", b"\xc0\xaf"]))
        .policy("value with NUL or not UTF-8");
    let nested = |depth: usize| {
        let level = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat();
        let last = [0u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec(), vec![1]].concat();
        valid().entry("x.a", kind::ARRAY, [level.repeat(depth - 1), last].concat())
    };
    t.read("arr_nested_2", nested(2)).policy("array of arrays");
    t.refuse("arr_nested_3", nested(3), Limit, "nested deeper than 2");
    t.refuse("arr_nested_20000", nested(20_000), Limit, "nested deeper than 2");
}

fn alignments(t: &mut Cases) {
    let (base, _) = valid();
    let aligned = |n: u32| base.clone().u32("general.alignment", n);
    // CVE-2025-0317: Ollama divided by it.
    for n in [0, 3, 12, u32::MAX] {
        let says = format!("general.alignment is {n}, not a power of two");
        t.refuse(&format!("align_{n}"), aligned(n), Malformed, &says);
    }
    t.refuse("align_24", aligned(24), Malformed, "general.alignment is 24, not a power of two")
        .policy("alignment 0 or no power of two");
    for n in [1, 4] {
        let mut raw = Raw::llama().u32("general.alignment", n).info("t", &[8], 0, 0).with_data(32);
        raw.alignment = n as usize;
        t.read(&format!("align_{n}"), raw).policy("alignment 1, 2, 4");
    }
    // The file would have to be that long.
    let says = "offset 128 is no multiple of 2147483648";
    t.refuse("align_2147483648", aligned(1 << 31), Malformed, says);
    let mut one = Raw::llama().u32("general.alignment", 1 << 20).info("t", &[8], 0, 0).with_data(32);
    t.refuse("align_1048576", one.clone(), Malformed, "tensor \"t\" takes 32 bytes from byte 1048576")
        .policy("alignment above 8");
    one.alignment = 1 << 20;
    t.read("align_1048576_padded", one);
    let text = base.clone().text("general.alignment", "32");
    t.refuse("align_str", text, Malformed, "general.alignment has type STRING");
}
