//! Codes of `.qpack` files, on one thread: how fast bytes become codes, and codes values; and
//! SHA-256 of bytes.
//!
//! `cargo bench --profile release --bench qpack` shows weights, or bytes, in a second. Arguments name rows of the table
//! instead of all.

#[path = "../tests/common/qpack.rs"]
mod made;
#[path = "common/timing.rs"]
mod timing;

use std::hint::black_box;

use qconv::block::{bits, trits};
use qconv::container::grouped::{Rows, Shape};
use qconv::container::qpack::Tensor;
use qconv::limits::Limits;
use qconv::packed::qpack::open;
use qconv::packed::write::{Data, Format, QpackEncoding, Target, round};
use qconv::sha256::Sha256;
use qconv::sha256::lanes::{self, Lane};
use timing::Table;

const ROWS: u64 = 64;
/// As in gpt-oss: no multiple of 256.
const COLS: u64 = 2880;

fn main() {
    let Some(table) = Table::of_args() else { return };
    let show =
        |name: &str, run: &mut dyn FnMut()| table.show(name, "G weights", (ROWS * COLS) as f64 / 1e9, run);
    let n = (ROWS * COLS) as usize;
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    let noise: Vec<u8> = (0..n).map(|_| next()).collect();
    let mut codes = vec![0u8; n];
    let digits: Vec<u8> = noise.iter().map(|b| b % 3).collect();
    let row = COLS.div_ceil(5) as usize;
    let mut bytes = vec![0; row * ROWS as usize];
    let rows = |bytes: &[u8], row: usize, codes: &mut [u8], unpack: &dyn Fn(&[u8], &mut [u8])| {
        for (bytes, codes) in bytes.chunks_exact(row).zip(codes.chunks_exact_mut(COLS as usize)) {
            unpack(black_box(bytes), codes);
        }
    };
    show("pack base 3", &mut || {
        for (bytes, codes) in bytes.chunks_exact_mut(row).zip(digits.chunks_exact(COLS as usize)) {
            trits::pack(black_box(codes), bytes);
        }
    });
    for (bytes, codes) in bytes.chunks_exact_mut(row).zip(digits.chunks_exact(COLS as usize)) {
        trits::pack(codes, bytes);
    }
    show("unpack base 3", &mut || {
        rows(&bytes, row, &mut codes, &|bytes, codes| assert!(trits::unpack(bytes, codes)))
    });
    for width in 1..=8 {
        let row = bits::bytes(COLS, width).unwrap() as usize;
        let mask = u8::MAX >> (8 - width);
        let fields: Vec<u8> = noise.iter().map(|b| b & mask).collect();
        let mut streams = vec![0; row * ROWS as usize];
        show(&format!("pack {width} bits"), &mut || {
            for (stream, codes) in streams.chunks_exact_mut(row).zip(fields.chunks_exact(COLS as usize)) {
                bits::pack(black_box(codes), width, stream);
            }
        });
        show(&format!("unpack {width} bits"), &mut || {
            rows(&noise[..row * ROWS as usize], row, &mut codes, &|bytes, codes| {
                bits::unpack(bytes, width, 0, codes);
            });
        });
    }
    for group_size in [64, COLS] {
        let groups = COLS.div_ceil(group_size);
        let shape = Shape { rows: ROWS, cols: COLS, bits: 4, group_size, groups };
        let lines = (ROWS * groups) as usize;
        let rows = Rows { codes: codes.clone(), scales: vec![0.5; lines], zeros: vec![8.0; lines] };
        let mut out = vec![0f32; n];
        show(&format!("values, groups of {group_size}"), &mut || {
            rows.all_weights(black_box(&shape), &mut out)
        });
    }
    decode(&table);
    sums(&table);
}

/// Made-up weights in each encoding, from a file to values.
fn decode(table: &Table) {
    const ROWS: u64 = 1024;
    let dir = tempfile::tempdir().unwrap();
    let weights = timing::noise((ROWS * COLS) as usize);
    for (name, encoding) in QpackEncoding::NAMES.iter().filter(|(_, e)| *e != QpackEncoding::Sparse) {
        let layout = Target::new(Format::Qpack(*encoding)).layout(&[], "float16").unwrap();
        let tensor = Tensor::new("w", vec![ROWS, COLS], layout.encoding(ROWS, COLS).unwrap()).unwrap();
        let mut rows = Rows::default();
        let data = match layout.grid() {
            Some(grid) => {
                round(grid, &weights, COLS, &mut rows).unwrap();
                Data::Integers(&rows)
            }
            None => Data::Weights(&weights),
        };
        let contents = made::fill(&tensor, |put| layout.write([ROWS, COLS], 0, data, put).map(drop));
        let path = made::write(dir.path(), vec![(tensor, contents)]);
        let (store, _) = open(&path, &Limits::default()).unwrap();
        let info = store.get("w").unwrap();
        let mut values = vec![0; (16 * COLS * 4) as usize];
        table.show(&format!("file to values, {name}"), "G weights", (ROWS * COLS) as f64 / 1e9, || {
            for start in (0..ROWS * COLS).step_by(16 * COLS as usize) {
                store.read(info, start * 4, &mut values).unwrap();
            }
        });
    }
}

/// One message, and as many bytes in several.
fn sums(table: &Table) {
    let bytes = vec![1u8; 1 << 19];
    let giga = bytes.len() as f64 / 1e9;
    table.show("SHA-256 of one message", "GB", giga, || {
        black_box(Sha256::digest(black_box(&bytes)));
    });
    for count in [1, 2, 4, 8, 16] {
        table.show(&format!("SHA-256 of {count} at once"), "GB", giga, || {
            let mut hashes = vec![Lane::beside(); count];
            lanes::update(hashes.iter_mut().zip(black_box(&bytes).chunks_exact(bytes.len() / count)));
            black_box(hashes);
        });
    }
}
