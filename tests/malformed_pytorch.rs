//! PyTorch files that lie, and pickles that want something done. The decisions are those of
//! `formats/spec/pytorch.md`.

mod common;
#[path = "common/torch.rs"]
mod torch;

use std::fs;

use qconv::ErrorKind::{Limit, Malformed, Unsupported};
use qconv::container::{Store, pytorch};
use qconv::limits::Limits;
use qconv::{ErrorKind, Result};
use torch::*;

fn open(bytes: &[u8]) -> Result<Store> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bin");
    fs::write(&path, bytes).unwrap();
    let store = pytorch::open(&path, &Limits::default())?;
    for t in store.tensors() {
        store.read_all(t)?;
    }
    Ok(store)
}

#[track_caller]
fn refused(case: &str, bytes: &[u8], kind: ErrorKind, says: &str) {
    match open(bytes) {
        Ok(_) => panic!("{case}: accepted"),
        Err(e) => {
            assert_eq!(e.kind(), kind, "{case}: {e}");
            assert!(e.to_string().contains(says), "{case}: {e}");
            assert!(e.path().is_some(), "{case}: {e} names no file");
        }
    }
}

#[track_caller]
fn refused_pickle(case: &str, pickle: &[u8], kind: ErrorKind, says: &str) {
    refused(case, &archive(pickle), kind, says);
}

#[test]
fn good_ones_are_read() {
    assert_eq!(open(&archive(&one(six()))).unwrap().tensors()[0].shape, [2, 3]);
    assert!(open(&zip(&[member("x/data.pkl", &whole(b"}"))])).unwrap().tensors().is_empty());
    let plain = [member("data.pkl", &one(six())), member("data/0", &[0; 24])];
    open(&zip(&plain)).unwrap();
    let zip64 = |n| {
        let bytes = zip(&plain);
        let len = bytes.len() as u64 - 22;
        let directory = (46 + 8 + 46 + 6) as u64;
        zip_with(&plain, &End { zip64: Some([len - directory, directory, n]), ..END })
    };
    open(&zip64(2)).unwrap();
    refused("zip64 count", &zip64(3), Malformed, "3");
    refused("zip64 count", &zip64(u64::MAX), Malformed, "cannot hold");
    let mut comment = archive(&one(six()));
    let at = comment.len() - 2;
    comment[at] = 5;
    comment.extend_from_slice(b"hello");
    open(&comment).unwrap();
    // A tensor reached on 2^60 ways, through a dict that holds itself too.
    let mut pickle = [b"}q\0", &text("a")[..], &six(), b"s", &text("me"), b"h\0s"].concat();
    for _ in 0..60 {
        pickle = [b"}q\x01".to_vec(), text("l"), pickle, b"q\x02s".to_vec(), text("r"), b"h\x02s".to_vec()]
            .concat();
    }
    assert_eq!(open(&archive(&whole(&pickle))).unwrap().tensors().len(), 1);
}

#[test]
fn names_are_refused_and_nothing_is_called() {
    for name in [
        "os.system",
        "posix.system",
        "builtins.eval",
        "__builtin__.exec",
        "torch.load",
        "torch.ComplexFloatStorage",
        "torch._utils._rebuild_sparse_tensor",
        "numpy.core.multiarray._reconstruct",
        "collections.OrderedDict.fromkeys",
        "torch.OrderedDict",
        "torch.",
        ".",
    ] {
        let (module, attribute) = name.rsplit_once('.').unwrap();
        let args = tuple(&[text("touch /tmp/pwned")]);
        let call = [format!("c{module}\n{attribute}\n").as_bytes(), &args, b"R"].concat();
        refused_pickle(name, &whole(&call), Unsupported, name);
        refused_pickle(name, &one(call), Unsupported, name);
        let stacked = [text(module), text(attribute), vec![0x93], args, b"R".to_vec()].concat();
        refused_pickle(name, &whole(&stacked), Unsupported, name);
        // No archive around it.
        refused("bare", &[whole(&stacked), vec![0; 600]].concat(), Unsupported, name);
    }
    // MEMOIZE writes to the number of entries, here over others, as Python does.
    let over = [
        &text("torch")[..],
        b"q\x01q\x01",
        &text("posix"),
        b"\x94",
        &text("device"),
        b"q\x02",
        &text("system"),
        b"\x94h\x01h\x02\x93",
    ];
    refused_pickle("memo", &whole(&over.concat()), Unsupported, "posix.system");
    let long = [text(&"x".repeat(1 << 20)), text("\x1b[31m\n"), vec![0x93]].concat();
    let message = open(&archive(&whole(&long))).unwrap_err().to_string();
    assert!(message.len() < 400 && !message.contains(['\n', '\x1b']), "{message}");
    for opcode in *b"iocPI01FLSVdgl2p\x81\x82\x83\x84\x8e\x8f\x90\x91\x92\x96\x97\x98\xff\0" {
        let kind = if opcode == b'c' { Malformed } else { Unsupported };
        let pickle = [b"\x80\x02)(", &[opcode][..]].concat();
        refused_pickle("opcode", &pickle, kind, if kind == Malformed { "ends" } else { "opcode 0x" });
    }
    for (first, says) in [(&b"\x80\x01"[..], "protocol 1"), (b"\x80\x06", "protocol 6"), (b"(d", "no pickle")]
    {
        refused_pickle("protocol", first, Unsupported, says);
    }
    let module = [tuple(&[text("module"), b"N".to_vec()]), b"Q".to_vec()].concat();
    refused_pickle("persistent module", &whole(&module), Unsupported, "\"module\"");
    let class = b"ctorch\nFloatStorage\n".to_vec();
    let view = tuple(&[text("0"), int(0), int(3)]);
    let id = tuple(&[text("storage"), class, text("0"), text("cpu"), int(6), view]);
    refused_pickle("storage view", &whole(&[id, b"Q".to_vec()].concat()), Unsupported, "view");
}

#[test]
fn lengths_are_held_against_the_file() {
    for (case, head) in [
        ("BINUNICODE", &b"X\xff\xff\xff\xff"[..]),
        ("BINUNICODE8", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"),
        ("BINUNICODE8", b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff"),
        ("BINSTRING", b"T\xff\xff\xff\xff"),
        ("SHORT_BINSTRING", b"U\xff"),
        ("LONG1", b"\x8a\xff"),
        ("LONG4", b"\x8b\xff\xff\xff\x7f"),
        ("LONG4", b"\x8b\xff\xff\xff\xff"),
        ("FRAME", b"\x95\0"),
        ("FRAME", b"\x95\x03\0\0\0\0\0\0\0}."),
        ("FRAME", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff}."),
        ("GLOBAL", b"cos"),
        ("BINFLOAT", b"G\0"),
        ("nothing", b""),
    ] {
        refused_pickle(case, &[b"\x80\x04", head].concat(), Malformed, "ends within");
    }
    refused_pickle("empty", b"", Malformed, "ends within");
    refused_pickle("rest", &[one(six()), vec![0]].concat(), Malformed, "1 bytes follow");
    refused_pickle("UTF-8", b"\x80\x02X\x01\0\0\0\xff.", Malformed, "UTF-8");
}

#[test]
fn size_and_depth_are_bounded() {
    let many = |n: usize, unit: &[u8]| [b"\x80\x04", &unit.repeat(n)[..]].concat();
    refused_pickle("marks", &many(2000, b"("), Limit, "deep");
    refused_pickle("lists", &many(1 << 20, b"]"), Limit, "deep");
    refused_pickle("values", &many(1 << 20, b"N"), Limit, "deep");
    refused_pickle("tuples", &[b"\x80\x02)", &[0x85; 3 << 20][..]].concat(), Limit, "objects");
    refused_pickle("memo", &[b"\x80\x02)", &[0x94; 3 << 20][..]].concat(), Limit, "objects");
    let row = [b"(".to_vec(), vec![b'N'; 1000], b"e".to_vec()].concat();
    refused_pickle("list", &[b"\x80\x02]".to_vec(), row.repeat(10_000)].concat(), Limit, "objects");
    // One list of pairs, made into a dict over and over.
    let list = [b"](".to_vec(), [b")", &b"NN\x86"[..]].concat()[1..].repeat(1000), b"eq\0".to_vec()].concat();
    let call = b"ccollections\nOrderedDict\nh\0\x85R".repeat(20_000);
    refused_pickle("copies", &[b"\x80\x02".to_vec(), list, call].concat(), Limit, "objects");
    // Deep, but within bounds: nothing recurses.
    let deep = [b"\x80\x02)", &[0x85; 1 << 19][..], b"."].concat();
    refused_pickle("deep tuple", &deep, Unsupported, "no dict of tensors");
}

#[test]
fn pickles_that_contradict_themselves() {
    for (case, pickle) in [
        ("no value", &b"."[..]),
        ("below a mark", b")(\x85."),
        ("no mark", b"t."),
        ("pair", b")\x86."),
        ("odd", b"}(Nu."),
        ("set in a list", b"](NNu."),
        ("append to a dict", b"}Na."),
        ("append to none", b"NNa."),
        ("key under a mark", b"}N(Ns."),
        ("memo", b"h\x07."),
        ("memo of nothing", b"q\0."),
        ("call", b"N)R."),
        ("arguments", b"ccollections\nOrderedDict\nNR."),
        ("arguments", b"ccollections\nOrderedDict\nN\x85R."),
        ("arguments", b"ccollections\nOrderedDict\n](NNe\x85R."),
        ("arguments", b"ctorch._utils\n_rebuild_tensor_v2\n)R."),
        ("arguments", b"ctorch._utils\n_rebuild_parameter\nNNN\x87R."),
        ("arguments", b"ctorch\nFloatStorage\n)R."),
        ("persistent", b"NQ."),
        ("persistent", b")Q."),
        ("name", b"NN\x93."),
    ] {
        refused_pickle(case, &[b"\x80\x02", pickle].concat(), Malformed, "its pickle");
    }
    refused_pickle("attributes", &whole(b")Nb"), Unsupported, "attributes");
    let two = [storage("torch\nFloatStorage", "0", 6), storage("torch\nHalfStorage", "0", 6)];
    refused_pickle("two types", &whole(&tuple(&two)), Malformed, "two types");
    let minus = storage("torch\nFloatStorage", "0", -1);
    refused_pickle("minus", &whole(&minus), Malformed, "number of elements");
    refused_pickle("class", &whole(&storage("torch\nfloat32", "0", 6)), Malformed, "class");
}

#[test]
fn dicts_of_tensors() {
    let nested = |key: &str, inner: &[u8]| (text(key), dict(&[(text("a"), inner.to_vec())]));
    refused_pickle("none", &whole(b"N"), Unsupported, "no dict of tensors");
    refused_pickle("list", &whole(&[&b"]"[..], &six(), b"a"].concat()), Unsupported, "no dict of tensors");
    refused_pickle("bare", &whole(&six()), Unsupported, "no dict of tensors");
    let two = dict(&[nested("model", &six()), nested("optimizer", &six())]);
    refused_pickle("two", &whole(&two), Unsupported, "2 dicts of tensors");
    let both = dict(&[(text("a"), six()), nested("b", &six())]);
    refused_pickle("both depths", &whole(&both), Unsupported, "2 dicts");
    let beside = dict(&[(text("a"), six()), (text("b"), [&b"]"[..], &six(), b"a"].concat())]);
    refused_pickle("beside", &whole(&beside), Unsupported, "1 of its 2 tensors");
    let twice = dict(&[(text("a"), six()), (text("a"), six())]);
    refused_pickle("twice", &whole(&twice), Malformed, "\"a\" appears twice");
    refused_pickle("number as key", &whole(&dict(&[(int(1), six())])), Unsupported, "no text");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x"), archive(&one(six()))).unwrap();
    for limits in [
        Limits { tensors: 0, ..Limits::default() },
        Limits { header_bytes: 90, ..Limits::default() },
        Limits { header_bytes: 150, ..Limits::default() },
    ] {
        assert_eq!(pytorch::open(&dir.path().join("x"), &limits).unwrap_err().kind(), Limit);
    }
}

#[test]
fn tensors_stay_in_their_storages() {
    let of = |numel, offset, size: &[i64], stride: &[i64]| {
        one(tensor(storage("torch\nFloatStorage", "0", numel), offset, size, stride))
    };
    let max = i64::MAX;
    for (case, pickle, says) in [
        ("offset", of(6, 1, &[2, 3], &[3, 1]), "leave its storage"),
        ("negative offset", of(6, -1, &[2, 3], &[3, 1]), "offset"),
        ("largest offset", of(6, max, &[2, 3], &[3, 1]), "leave its storage"),
        ("negative size", of(6, 0, &[-2, 3], &[3, 1]), "no size"),
        ("negative stride", of(6, 5, &[2, 3], &[-3, -1]), "no size"),
        ("stride", of(6, 0, &[2, 3], &[4, 1]), "leave its storage"),
        ("stride overflows", of(6, 0, &[3, 3], &[max, 1]), "leave its storage"),
        ("sum overflows", of(6, max, &[2, 2], &[max, max]), "leave its storage"),
        ("product overflows", of(6, 0, &[1 << 32, 1 << 32], &[0, 0]), "2^63"),
        ("bytes overflow", of(6, 0, &[max], &[0]), "2^63"),
        ("product wraps to 0", of(6, 0, &[1 << 62, 4], &[0, 0]), "2^63"),
        ("more strides", of(6, 0, &[6], &[1, 1]), "strides"),
        ("storage too long", of(7, 0, &[6], &[1]), "24 bytes"),
        ("storage too short", of(5, 0, &[5], &[1]), "24 bytes"),
        ("storage overflows", of(max, 0, &[6], &[1]), "2^63"),
    ] {
        refused_pickle(case, &pickle, Malformed, says);
    }
    refused_pickle("repeated", &of(6, 0, &[7], &[0]), Unsupported, "repeats");
    refused_pickle("dimensions", &of(6, 0, &[1; 9], &[1; 9]), Unsupported, "9 dimensions");
    let absent = one(tensor(storage("torch\nFloatStorage", "../../etc/passwd", 6), 0, &[6], &[1]));
    refused_pickle("absent", &absent, Malformed, "is missing");
    open(&archive(&of(6, 6, &[0, 9], &[max, max]))).unwrap();
    open(&archive(&of(6, 5, &[1, 1], &[max, max]))).unwrap();
    open(&archive(&of(6, 0, &[2, 2], &[0, 5]))).unwrap();
}

/// A few bytes that name a storage again are another tensor to all who come after.
#[test]
fn names_of_one_storage_are_counted() {
    let numel: usize = 1 << 14;
    let of = |offset: usize, n: usize| {
        tensor(storage("torch\nFloatStorage", "0", numel as i64), offset as i64, &[n as i64], &[1])
    };
    let file = |views: &mut dyn Iterator<Item = Vec<u8>>| {
        let entries: Vec<_> = views.enumerate().map(|(i, view)| (text(&format!("t{i}")), view)).collect();
        let data = vec![0; 4 * numel];
        zip(&[member("x/data.pkl", &whole(&dict(&entries))), member("x/data/0", &data)])
    };
    open(&file(&mut (0..64).map(|_| of(0, numel)))).unwrap();
    refused("whole", &file(&mut (0..65).map(|_| of(0, numel))), Limit, "at most 64 times");
    refused("nearly", &file(&mut (0..4000).map(|i| of(i, numel / 2))), Limit, "at most 64 times");
    // One behind another: a checkpoint in one storage.
    assert_eq!(open(&file(&mut (0..4096).map(|i| of(i * 4, 4)))).unwrap().tensors().len(), 4096);
    // What is small can be shared by all layers.
    let views: Vec<_> = (0..1000).map(|i| (text(&format!("t{i}")), six())).collect();
    assert_eq!(open(&archive(&whole(&dict(&views)))).unwrap().tensors().len(), 1000);
}

#[test]
fn archives() {
    let pickle = member("x/data.pkl", &one(six()));
    let data = member("x/data/0", &[0; 24]);
    let with = |change: &dyn Fn(&mut Member)| {
        let mut data = data.clone();
        change(&mut data);
        zip(&[pickle.clone(), data])
    };
    refused("encrypted", &with(&|m| m.flags = 1), Unsupported, "encrypted");
    refused("deflated", &with(&|m| m.method = 8), Unsupported, "compressed");
    refused("two sizes", &with(&|m| m.len = Some(25)), Malformed, "two sizes");
    refused("too long", &with(&|m| (m.len, m.packed) = (Some(1000), Some(1000))), Malformed, "directory");
    refused("huge", &with(&|m| (m.len, m.packed) = (Some(u32::MAX - 1), Some(u32::MAX - 1))), Malformed, "");
    refused("no zip64", &with(&|m| m.len = Some(u32::MAX)), Malformed, "lacks its size");
    refused("overlap", &with(&|m| m.at = Some(0)), Malformed, "not where");
    refused("beyond", &with(&|m| m.at = Some(u32::MAX - 1)), Malformed, "outside");
    refused("in the directory", &with(&|m| m.at = Some(400)), Malformed, "");
    refused("called otherwise", &with(&|m| m.name_at_data = Some("x/data/1")), Malformed, "not where");
    let twice = zip(&[pickle.clone(), data.clone(), data.clone()]);
    refused("twice", &twice, Malformed, "comes twice");
    // The second member lies in the first one's data.
    let inner = zip(std::slice::from_ref(&data));
    let outer = [
        pickle.clone(),
        member("x/shell", &inner),
        Member { at: Some((30 + 10 + pickle.data.len() + 30 + 7) as u32), ..data.clone() },
    ];
    refused("one in another", &zip(&outer), Malformed, "overlap");
    for (case, end, kind, says) in [
        ("count", End { members: Some(3), ..END }, Malformed, "cannot hold"),
        ("count", End { members: Some(1), ..END }, Malformed, "not 1"),
        ("count", End { members: Some(9000), ..END }, Malformed, "cannot hold"),
        ("disk", End { disk: 1, ..END }, Unsupported, "several files"),
        ("zip64", End { zip64: Some([0, 0, 0]), ..END }, Malformed, ""),
        ("zip64", End { zip64: Some([u64::MAX, u64::MAX, 2]), ..END }, Malformed, ""),
        ("zip64", End { zip64: Some([0, 0, 0]), locator: Some(u64::MAX), ..END }, Malformed, "outside"),
        ("zip64", End { zip64: Some([0, 0, 0]), locator: Some(3), ..END }, Malformed, "missing"),
    ] {
        refused(case, &zip_with(&[pickle.clone(), data.clone()], &end), kind, says);
    }
    let whole = zip(&[pickle.clone(), data.clone()]);
    refused("behind", &[&whole[..], b"x"].concat(), Malformed, "directory is missing");
    refused("before", &[b"PK\x03\x04", &whole[..]].concat(), Malformed, "end at");
    let also = |name: &str, text: &[u8]| zip(&[pickle.clone(), data.clone(), member(name, text)]);
    open(&also("x/version", b"3\n")).unwrap();
    open(&also("x/byteorder", b"little")).unwrap();
    open(&also("x/byteorder", b"big")).unwrap();
    refused("byte order", &also("x/byteorder", b"middle"), Malformed, "middle");
    refused("byte order", &also("x/byteorder", &[b'x'; 100]), Limit, "100 bytes");
    refused("version", &also("x/version", b"11"), Unsupported, "\"11\"");
    refused("version", &also("x/version", b"0"), Unsupported, "\"0\"");
    refused("script", &also("x/constants.pkl", b""), Unsupported, "TorchScript");
    refused("two pickles", &also("y/data.pkl", b""), Malformed, "y/data.pkl");
    refused("no pickle", &zip(std::slice::from_ref(&data)), Unsupported, "without data.pkl");
    refused("empty", b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", Malformed, "no PyTorch file");
    let deflated = |method, data: &[u8], len| {
        let pickle = Member { method, len: Some(len), ..member("x/data.pkl", data) };
        zip(&[pickle, member("x/data/0", &[0; 24])])
    };
    refused("method", &deflated(12, b"BZh9", 10), Unsupported, "method 12");
    refused("no deflate", &deflated(8, &[0xff; 40], 100), Malformed, "does not unpack");
    refused("bomb", &deflated(8, &[0; 40], u32::MAX - 1), Limit, "at most");
    // A stored block of three bytes.
    let block = b"\x01\x03\0\xfc\xff\x80\x02N";
    refused("length", &deflated(8, block, 2), Malformed, "does not unpack");
    refused("length", &deflated(8, block, 4), Malformed, "does not unpack");
    refused("deflated", &deflated(8, block, 3), Malformed, "ends within");
}

/// An old file: a pickle, its list of keys, its storages.
fn old(pickle: &[u8], keys: &[&str], storages: &[(u64, usize)]) -> Vec<u8> {
    let keys: Vec<u8> = keys.iter().flat_map(|k| text(k)).collect();
    let mut bytes = [
        &b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."[..],
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}.",
        pickle,
        &whole(&[b"](", &keys[..], b"e"].concat()),
    ]
    .concat();
    for (count, len) in storages {
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend(vec![0; *len]);
    }
    bytes
}

#[test]
fn old_files() {
    let pickle = one(six());
    let good = old(&pickle, &["0"], &[(6, 24)]);
    assert_eq!(open(&good).unwrap().tensors()[0].nbytes, 24);
    refused("count", &old(&pickle, &["0"], &[(5, 24)]), Malformed, "has 5 elements");
    refused("count", &old(&pickle, &["0"], &[(u64::MAX, 24)]), Malformed, "elements");
    refused("data cut", &old(&pickle, &["0"], &[(6, 23)]), Malformed, "beyond the file");
    refused("rest", &old(&pickle, &["0"], &[(6, 25)]), Malformed, "1 bytes follow");
    refused("no keys", &old(&pickle, &[], &[]), Malformed, "is missing");
    refused("other key", &old(&pickle, &["1"], &[(6, 24)]), Malformed, "belongs to nothing");
    refused("key twice", &old(&pickle, &["0", "0"], &[(6, 24), (6, 24)]), Malformed, "twice");
    // One long key, named again and again by few bytes.
    let mut many = old(&pickle, &[], &[]);
    let list = [text(&"k".repeat(1 << 20)), b"q\0".to_vec(), b"h\0".repeat(1 << 17), b"e.".to_vec()].concat();
    many.truncate(many.len() - 2);
    refused("key many times", &[many, list].concat(), Malformed, "twice");
    let at = good.windows(4).position(|w| w == b"M\xe9\x03.").unwrap();
    let mut other = good.clone();
    other[at + 1] = 0;
    refused("protocol", &other, Unsupported, "protocol");
    let call = whole(b"cos\nsystem\n(X\x02\0\0\0lstR");
    refused("call", &old(&call, &[], &[]), Unsupported, "os.system");
    let huge = one(tensor(storage("torch\nFloatStorage", "0", i64::MAX), 0, &[6], &[1]));
    refused("huge", &old(&huge, &["0"], &[(i64::MAX as u64, 24)]), Malformed, "2^63");
    // Longer than what is read at first.
    let long = whole(&dict(&[(text(&"n".repeat(3 << 20)), six())]));
    open(&old(&long, &["0"], &[(6, 24)])).unwrap();
    let mut tar = vec![0; 600];
    tar[257..262].copy_from_slice(b"ustar");
    refused("tar", &tar, Unsupported, "tar archive");
    refused("plain pickle", &[whole(b"}"), vec![0xff; 8]].concat(), Unsupported, "none that torch wrote");
    refused("nothing", b"", Malformed, "no PyTorch file");
    refused("GGUF", b"GGUF\x03\0\0\0", Malformed, "no PyTorch file");
}

#[test]
fn no_truncation_and_no_changed_byte_gets_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.bin");
    let mut files: Vec<Vec<u8>> = ["plain-2.pt", "deflated-5.pt", "lpips-alex-0.0.pth"]
        .iter()
        .map(|name| fs::read(common::fixture("pytorch").join(name)).unwrap())
        .collect();
    files.push(archive(&one(six())));
    files.push(old(&one(six()), &["0"], &[(6, 24)]));
    for whole in files {
        fs::write(&path, &whole).unwrap();
        let limits = Limits::default();
        let read = || -> Result<()> {
            let store = pytorch::open(&path, &limits)?;
            store.tensors().iter().try_for_each(|t| store.read_all(t).map(drop))
        };
        read().unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        for (i, &old) in whole.iter().enumerate() {
            for byte in [0, b'.', 0xff, old ^ 1, old] {
                qconv::sys::write_all_at(&file, &[byte], i as u64).unwrap();
                let _ = read(); // an error or not, never a panic
            }
        }
        read().unwrap();
        for n in (0..whole.len()).rev() {
            file.set_len(n as u64).unwrap();
            let error = read().expect_err("cut");
            assert!(matches!(error.kind(), Malformed | Unsupported), "cut at {n}: {error}");
        }
    }
}
