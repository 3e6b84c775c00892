//! qconv's own container.

use qconv::container::InputFile;
use qconv::container::qpack::planes::{Compressed, Planes};
use qconv::container::qpack::write::ending;
use qconv::container::qpack::{Manifest, Qpack};
use qconv::packed::qpack as encodings;
use qconv::sha256::Sha256;

use super::containers::{limits, read};
use super::input::{Bytes, part, parts};
use super::scratch;

const HEADER: usize = 64;
const MOST_BYTES: u64 = 1 << 19;

/// A manifest; what it says is written again the same.
pub fn manifest(data: &[u8]) -> bool {
    let Ok(manifest) = Manifest::parse(data, &limits()) else { return false };
    let bytes = manifest.bytes().expect("what was read can be written");
    let again = Manifest::parse(&bytes, &limits()).expect("what was written can be read");
    assert!(again.bytes().expect("it was written before") == bytes);
    let _ = manifest.places();
    for tensor in &manifest.tensors {
        let _ = tensor.check_readable();
    }
    true
}

/// A file, from its manifest and the bytes of its segments; sums and footer are put right. Without parts, as it is.
pub fn file(data: &[u8]) -> bool {
    let files = parts(data);
    let Some(text) = part(&files, "manifest") else { return opened(data) };
    let Ok(mut manifest) = Manifest::parse(text, &limits()) else { return false };
    let segments: Vec<_> = manifest.segments().cloned().collect();
    let Ok(places) = manifest.places() else { return false };
    let end = places.last().copied().unwrap_or(HEADER as u64);
    if end > MOST_BYTES {
        return false;
    }
    let filling = part(&files, "segments").filter(|s| !s.is_empty()).unwrap_or(&[0]);
    let mut bytes = vec![0; end as usize];
    let mut from = filling.iter().copied().cycle();
    let mut summed = Vec::new();
    for (mut segment, at) in segments.into_iter().zip(&places) {
        let content = &mut bytes[*at as usize..][..segment.bytes as usize];
        content.iter_mut().zip(&mut from).for_each(|(to, from)| *to = from);
        segment.sha256 = Sha256::digest(&*content);
        summed.push(segment);
    }
    manifest.set_segments(summed);
    bytes[..12].copy_from_slice(b"\x89qpack\r\n\x01\0\0\0");
    let Ok((_, tail, _)) = ending(&manifest) else { return false };
    bytes.extend(tail);
    opened(&bytes)
}

fn opened(bytes: &[u8]) -> bool {
    let path = scratch::file("a.qpack", bytes);
    let Ok(model) = Qpack::open(&path, &limits()) else { return false };
    let _ = model.verify(1, &|_| true);
    let _ = (model.check_readable(), model.read_files(|_| true, &limits()).map(Iterator::count));
    let Ok((store, tensors)) = model.into_parts() else { return true };
    if let Ok(store) = encodings::join(store, &tensors) {
        read(&store);
    }
    true
}

/// Compressed segments: any bytes as one, and any content there and back.
pub fn planes(data: &[u8]) -> bool {
    let mut input = Bytes(data);
    let planes = Planes { planes: usize::from(input.u8() % 8) + 1, chunk: 1 << 16 };
    let bytes = u64::from(input.u16()) << (input.u8() % 3);
    let rest = input.0;
    let (mut stored, mut entries) = (Vec::new(), Vec::new());
    let chunk = &rest[..rest.len().min(planes.chunk as usize)];
    planes.compress(chunk, &mut stored, &mut entries);
    let mut back = vec![0xEE; chunk.len()];
    planes.decompress(&stored, &entries, &mut back).expect("it was compressed");
    assert!(back == chunk);
    let file = InputFile::of_bytes("a", rest.to_vec());
    let Ok(compressed) = Compressed::open(&file, (0, rest.len() as u64), bytes, planes) else { return false };
    let mut out = vec![0; bytes as usize];
    compressed.read(&file, 0, &mut out).is_ok()
}
