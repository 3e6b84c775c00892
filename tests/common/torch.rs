//! PyTorch files put together by hand, right or wrong.
#![allow(dead_code)] // each test uses its part

// A zip archive, right or wrong.

#[derive(Clone)]
pub struct Member {
    pub name: String,
    pub data: Vec<u8>,
    pub method: u16,
    pub flags: u16,
    /// As the directory has them, where they differ from the truth.
    pub len: Option<u32>,
    pub packed: Option<u32>,
    pub at: Option<u32>,
    pub name_at_data: Option<&'static str>,
}

pub fn member(name: &str, data: &[u8]) -> Member {
    let (name, data) = (name.to_owned(), data.to_vec());
    Member { name, data, method: 0, flags: 0, len: None, packed: None, at: None, name_at_data: None }
}

pub struct End {
    pub members: Option<u16>,
    pub disk: u16,
    pub zip64: Option<[u64; 3]>,
    pub locator: Option<u64>,
}

pub const END: End = End { members: None, disk: 0, zip64: None, locator: None };

pub fn put(out: &mut Vec<u8>, parts: &[(u64, usize)]) {
    for (value, bytes) in parts {
        out.extend_from_slice(&value.to_le_bytes()[..*bytes]);
    }
}

pub fn zip_with(members: &[Member], end: &End) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for m in members {
        let name = m.name_at_data.unwrap_or(&m.name).as_bytes();
        let at = m.at.unwrap_or(out.len() as u32);
        let (len, packed) = (m.len.unwrap_or(m.data.len() as u32), m.packed.unwrap_or(m.data.len() as u32));
        out.extend_from_slice(b"PK\x03\x04");
        put(&mut out, &[(20, 2), (m.flags.into(), 2), (m.method.into(), 2), (0, 8), (packed.into(), 4)]);
        put(&mut out, &[(len.into(), 4), (name.len() as u64, 2), (0, 2)]);
        out.extend_from_slice(name);
        out.extend_from_slice(&m.data);
        directory.extend_from_slice(b"PK\x01\x02");
        put(&mut directory, &[(20, 2), (20, 2), (m.flags.into(), 2), (m.method.into(), 2), (0, 8)]);
        put(&mut directory, &[(packed.into(), 4), (len.into(), 4), (m.name.len() as u64, 2), (0, 8), (0, 4)]);
        put(&mut directory, &[(at.into(), 4)]);
        directory.extend_from_slice(m.name.as_bytes());
    }
    let (offset, bytes, count) = (out.len() as u64, directory.len() as u64, members.len() as u64);
    out.extend_from_slice(&directory);
    let mut classic = (offset, bytes, u64::from(end.members.unwrap_or(count as u16)));
    if let Some([offset, bytes, count]) = end.zip64 {
        let at = out.len() as u64;
        out.extend_from_slice(b"PK\x06\x06");
        put(&mut out, &[(44, 8), (45, 2), (45, 2), (0, 8), (count, 8), (count, 8), (bytes, 8), (offset, 8)]);
        out.extend_from_slice(b"PK\x06\x07");
        put(&mut out, &[(0, 4), (end.locator.unwrap_or(at), 8), (1, 4)]);
        classic = (0xffff_ffff, 0xffff_ffff, 0xffff);
    }
    out.extend_from_slice(b"PK\x05\x06");
    let (offset, bytes, count) = classic;
    put(&mut out, &[(end.disk.into(), 2), (0, 2), (count, 2), (count, 2), (bytes, 4), (offset, 4), (0, 2)]);
    out
}

pub fn zip(members: &[Member]) -> Vec<u8> {
    zip_with(members, &END)
}

/// A file with this pickle, and a storage `0` of 24 zeros.
pub fn archive(pickle: &[u8]) -> Vec<u8> {
    zip(&[member("x/data.pkl", pickle), member("x/data/0", &[0; 24])])
}

// Pickles.

pub fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

pub fn int(n: i64) -> Vec<u8> {
    [&[0x8a, 8], &n.to_le_bytes()[..]].concat()
}

pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

pub fn ints(numbers: &[i64]) -> Vec<u8> {
    tuple(&numbers.iter().map(|n| int(*n)).collect::<Vec<_>>())
}

pub fn storage(class: &str, key: &str, numel: i64) -> Vec<u8> {
    let class = format!("c{class}\n").into_bytes();
    [tuple(&[text("storage"), class, text(key), text("cpu"), int(numel)]), b"Q".to_vec()].concat()
}

pub fn tensor(storage: Vec<u8>, offset: i64, size: &[i64], stride: &[i64]) -> Vec<u8> {
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let args = tuple(&[storage, int(offset), ints(size), ints(stride), b"\x89".to_vec(), hooks]);
    [b"ctorch._utils\n_rebuild_tensor_v2\n", &args[..], b"R"].concat()
}

/// Six floats.
pub fn six() -> Vec<u8> {
    tensor(storage("torch\nFloatStorage", "0", 6), 0, &[2, 3], &[3, 1])
}

pub fn dict(entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<u8> = entries.iter().flat_map(|(k, v)| [&k[..], v].concat()).collect();
    [b"}(", &entries[..], b"u"].concat()
}

pub fn whole(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02", value, b"."].concat()
}

/// A state dict with one tensor.
pub fn one(tensor: Vec<u8>) -> Vec<u8> {
    whole(&dict(&[(text("a"), tensor)]))
}
