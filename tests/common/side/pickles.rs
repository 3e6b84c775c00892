//! PyTorch files through the program, and how much memory they take. The bytes of each case of
//! `malformed_pytorch.rs` that executes, grows or reaches outside.

use qconv::ErrorKind::{Limit, Malformed, Unsupported};
use qconv::container::pytorch;
use qconv::limits::Limits;

use crate::side::{Accepted, Expect, Place, Refused, check};
use crate::torch::*;

/// By the library, and inspected by the program.
#[track_caller]
fn opens(place: &Place, case: &str, bytes: &[u8], expect: Expect) {
    place.put("x.bin", bytes);
    let path = place.path("x.bin");
    let read = || -> qconv::Result<()> {
        let store = pytorch::open(&path, &Limits::default())?;
        store.tensors().iter().try_for_each(|t| store.read_all(t).map(drop))
    };
    check(case, read(), expect);
    place.program(case, &["inspect".as_ref(), path.as_os_str()], expect);
}

/// Numbers of a tuple of a million, a list or a dict by few bytes: what grows fastest.
#[test]
fn memory_is_bounded() {
    let place = Place::new();
    let begin = &b"\x80\x04"[..];
    let units = |unit: &[u8], n: usize| [begin, &unit.repeat(n)].concat();
    let list = |unit: &[u8], n: usize| [begin, b"](", &unit.repeat(n), b"e."].concat();
    // A list that takes portions of its own, over and over.
    let portion = [b"(".to_vec(), vec![b'N'; 1000], b"e".to_vec()].concat();
    let one = [six(), b"q\0".to_vec()].concat();
    let args = |n: usize| [&one[..], b"0"].concat().len() + n;
    assert!(args(0) > 0);
    // The same storage and sizes, and a tensor for every few bytes.
    let view = [
        storage("torch\nFloatStorage", "0", 6),
        b"q\x01".to_vec(),
        ints(&[6]),
        b"q\x02".to_vec(),
        ints(&[1]),
        b"q\x03".to_vec(),
    ]
    .concat();
    let call = [
        b"ctorch._utils\n_rebuild_tensor\nq\x04".to_vec(),
        b"(h\x01K\0h\x02h\x03tq\x05".to_vec(),
        b"R".to_vec(),
    ]
    .concat();
    let tensors =
        [b"\x80\x02](".to_vec(), view, call, b"h\x04h\x05R".repeat(1 << 20), b"e.".to_vec()].concat();
    let storages: Vec<u8> = (0..200_000)
        .flat_map(|i| {
            let key = format!("{i:06}");
            [b"(h\x01h\x02X\x06\0\0\0", key.as_bytes(), b"h\x01K\x06tQ"].concat()
        })
        .collect();
    let storages =
        [&b"\x80\x02]("[..], b"X\x07\0\0\0storageq\x01ctorch\nFloatStorage\nq\x02", &storages, b"e."]
            .concat();
    for (case, pickle, expect) in [
        ("tuples in tuples", [begin, b")", &[0x85; 16 << 20]].concat(), Refused(Limit, "objects")),
        ("empty tuples", list(b")", 1 << 17), Refused(Unsupported, "no dict of tensors")),
        ("lists without end", units(b"](]]]]]]]]]]]]]]]]e0", 1 << 20), Refused(Unsupported, "opcode 0x30")),
        ("memo", [begin, b")", &[0x94; 16 << 20]].concat(), Refused(Limit, "objects")),
        ("far memo", [begin, b")r\xff\xff\xff\x7f."].concat(), Refused(Malformed, "far beyond")),
        ("values", [begin, b"]", &portion.repeat(16_000)].concat(), Refused(Limit, "values")),
        ("marks", units(b"(", 1 << 20), Refused(Limit, "deep")),
        ("stack", units(b"N", 1 << 20), Refused(Limit, "deep")),
        ("tensors", tensors, Refused(Limit, "131072 tensors")),
        ("storages", storages, Refused(Limit, "131072 tensors or storages")),
        (
            "a number of a million bytes",
            [begin, &b"\x8b"[..], &(1u32 << 20).to_le_bytes(), &vec![0xff; 1 << 20], b"."].concat(),
            Refused(Unsupported, "no dict of tensors"),
        ),
        (
            "33 MiB",
            [begin, &b"\x8b"[..], &(33u32 << 20).to_le_bytes(), &vec![1; 33 << 20], b"."].concat(),
            Refused(Limit, "at most 33554432"),
        ),
    ] {
        opens(&place, case, &archive(&pickle), expect);
    }
}

/// Everything that would do something in Python is refused by its name, by the program too.
#[test]
fn nothing_is_executed() {
    let place = Place::new();
    let touched = place.path("touched");
    let command = format!("touch {}", touched.display());
    let arg = tuple(&[text(&command)]);
    let global = |name: &str| format!("c{name}\n").into_bytes();
    for (case, pickle, says) in [
        ("REDUCE", [global("posix\nsystem"), arg.clone(), b"R".to_vec()].concat(), "posix.system"),
        ("REDUCE of eval", [global("builtins\neval"), arg.clone(), b"R".to_vec()].concat(), "builtins.eval"),
        (
            "STACK_GLOBAL",
            [text("os"), text("system"), b"\x93".to_vec(), arg.clone(), b"R".to_vec()].concat(),
            "os.system",
        ),
        ("GLOBAL alone", global("subprocess\nPopen"), "subprocess.Popen"),
        ("within torch", [global("torch.hub\nload"), arg.clone(), b"R".to_vec()].concat(), "torch.hub.load"),
        ("INST", [b"(".to_vec(), text(&command), b"iposix\nsystem\n".to_vec()].concat(), "opcode 0x69"),
        ("OBJ", [b"(".to_vec(), text(&command), b"o".to_vec()].concat(), "opcode 0x6f"),
        ("NEWOBJ", [global("collections\nOrderedDict"), b")\x81".to_vec()].concat(), "opcode 0x81"),
        ("NEWOBJ_EX", [global("collections\nOrderedDict"), b")}\x92".to_vec()].concat(), "opcode 0x92"),
        ("EXT1", b"\x82\x01".to_vec(), "opcode 0x82"),
        ("EXT4", b"\x84\x01\0\0\0".to_vec(), "opcode 0x84"),
        ("PERSID", b"Pstorage\n".to_vec(), "opcode 0x50"),
        ("DUP", b")2".to_vec(), "opcode 0x32"),
        ("BUILD of a list", b"]}b".to_vec(), "an object with attributes"),
        ("BUILD of a tensor", [six(), b"}b".to_vec()].concat(), "an object with attributes"),
        ("memory view", b"\x97".to_vec(), "opcode 0x97"),
    ] {
        opens(&place, case, &archive(&whole(&pickle)), Refused(Unsupported, says));
        // Behind a good dict, and without an archive.
        let behind = [&b"\x80\x02"[..], &dict(&[(text("a"), six())]), &pickle, b"."].concat();
        opens(&place, case, &archive(&behind), Refused(Unsupported, says));
        opens(&place, case, &[whole(&pickle), vec![7; 600]].concat(), Refused(Unsupported, says));
    }
    assert!(!touched.exists());
}

/// Members of the archive that lie about themselves.
#[test]
fn archives_through_the_program() {
    let place = Place::new();
    let pickle = member("x/data.pkl", &one(six()));
    let data = member("x/data/0", &[0; 24]);
    let headers = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = zip(&[pickle.clone(), data.clone()]);
        change(&mut bytes);
        bytes
    };
    // The second member's own header.
    let at = zip(std::slice::from_ref(&pickle)).windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let outside = |name: &str| {
        let zipped = zip(&[
            member(&format!("{name}data.pkl"), &one(six())),
            member(&format!("{name}data/0"), &[0; 24]),
        ]);
        (zipped, Accepted)
    };
    for (case, (bytes, expect)) in [
        ("another method", (headers(&|b| b[at + 8] = 8), Refused(Malformed, "in its own header"))),
        ("another size", (headers(&|b| b[at + 18] = 23), Refused(Malformed, "in its own header"))),
        ("another length", (headers(&|b| b[at + 22] = 25), Refused(Malformed, "in its own header"))),
        ("sizes that follow", (headers(&|b| (b[at + 6], b[at + 18], b[at + 22]) = (8, 0, 0)), Accepted)),
        ("encrypted there alone", (headers(&|b| b[at + 6] = 1), Refused(Unsupported, "is encrypted"))),
        // Names are looked up and never become paths.
        ("names that climb", outside("../../")),
        ("names from the root", outside("/")),
        ("names with NUL", outside("a\0b/")),
        (
            "a storage that climbs",
            (
                archive(&one(tensor(
                    storage("torch\nFloatStorage", "../../../etc/passwd", 6),
                    0,
                    &[6],
                    &[1],
                ))),
                Refused(Malformed, "is missing"),
            ),
        ),
        ("a bomb", {
            let bomb = miniz_oxide::deflate::compress_to_vec(
                &[b"\x80\x02", &vec![b'('; (31 << 20) - 2][..]].concat(),
                9,
            );
            let packed = Member { method: 8, len: Some(31 << 20), ..member("x/data.pkl", &bomb) };
            (zip(&[packed, data.clone()]), Refused(Limit, "deep"))
        }),
    ] {
        opens(&place, case, &bytes, expect);
    }
}
