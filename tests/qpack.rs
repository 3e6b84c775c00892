//! `.qpack` files: what goes into an encoding comes out of it.

#[path = "common/qpack.rs"]
mod made;

use made::{Contents, example, file, file_on, fill, write};
use proptest::prelude::*;
use qconv::block::{bf16_from_f32, codec, f16_from_f32, f32_from_bf16, f32_from_f16};
use qconv::container::Store;
use qconv::container::grouped::Rows;
use qconv::container::qpack::planes::{KIND, Planes};
use qconv::container::qpack::write::layout;
use qconv::container::qpack::{
    Codebook, Compression, Encoding, Integers, Manifest, Matrix, Nested, Qpack, Scaled, Segment, Sparse,
    Tensor, Ternary, Trits, Zeros,
};
use qconv::inspect::inspect;
use qconv::limits::Limits;
use qconv::packed::qpack::{
    open, put_codebook, put_integers, put_scaled, put_sparse, put_ternary, sign_bytes,
};
use qconv::packed::write::{Data, Grid, Layout, QpackIntegers, round};
use qconv::tensor::DType;
use sha2::{Digest, Sha256};

/// Numbers from a seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn code(&mut self, n: u32) -> u8 {
        self.below(n.into()) as u8
    }

    /// A number of a type.
    fn number(&mut self, dtype: DType) -> f32 {
        let x = (self.next() as f32 / (1u64 << 30) as f32 - 1.0) * [1e-6, 1.0, 300.0][self.below(3) as usize];
        match dtype {
            DType::F16 => f32_from_f16(f16_from_f32(x)),
            DType::BF16 => f32_from_bf16(bf16_from_f32(x)),
            DType::F8_E8M0 => match self.below(255) {
                0 => f32::from_bits(1 << 22),
                e => f32::from_bits((e as u32) << 23),
            },
            _ => x,
        }
    }
}

const SCALES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F8_E8M0];

fn shapes() -> impl Strategy<Value = Vec<u64>> {
    prop_oneof![
        (1u64..5, 1u64..90).prop_map(|(r, c)| vec![r, c]),
        (1u64..4, 1u64..4, 1u64..40).prop_map(|(a, b, c)| vec![a, b, c]),
        (1u64..70).prop_map(|c| vec![c]),
        Just(vec![]),
    ]
}

/// Rows of codes below `codes`, whose blocks share scales and zeros.
fn rows(
    noise: &mut Noise,
    matrix: Matrix,
    block: [u64; 2],
    codes: u32,
    scales: DType,
    zero: impl Fn(&mut Noise) -> f32,
) -> Rows {
    let mut rows = Rows {
        codes: (0..matrix.rows * matrix.cols).map(|_| noise.code(codes)).collect(),
        ..Rows::default()
    };
    let across = matrix.blocks(block)[1] as usize;
    for row in 0..matrix.rows {
        if row % block[0] == 0 {
            rows.scales.extend((0..across).map(|_| noise.number(scales)));
            rows.zeros.extend((0..across).map(|_| zero(noise)));
        } else {
            rows.scales.extend_from_within(rows.scales.len() - across..);
            rows.zeros.extend_from_within(rows.zeros.len() - across..);
        }
    }
    rows
}

/// Some of these rows.
fn part(rows: &Rows, matrix: Matrix, across: u64, from: u64, to: u64) -> Rows {
    let cut = |n: u64| (from * n) as usize..(to * n) as usize;
    Rows {
        codes: rows.codes[cut(matrix.cols)].to_vec(),
        scales: rows.scales[cut(across)].to_vec(),
        zeros: rows.zeros[cut(across)].to_vec(),
    }
}

fn stored(tensor: Tensor, contents: Contents) -> (Store, Tensor, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), vec![(tensor, contents)]);
    let (store, mut tensors) = open(path, &Limits::default()).unwrap();
    (store, tensors.pop().unwrap(), dir)
}

/// The values from element `start` on, as commands read them.
fn values(store: &Store, start: usize, end: usize) -> Vec<u32> {
    let info = store.get("w").unwrap();
    let mut bytes = vec![0; (end - start) * 4];
    store.read(info, start as u64 * 4, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// That all values, and those of a range, are these.
fn check_values(store: &Store, wanted: &[f32], noise: &mut Noise) {
    assert_eq!(store.tensors().len(), 1);
    let wanted: Vec<u32> = wanted.iter().map(|v| v.to_bits()).collect();
    assert_eq!(values(store, 0, wanted.len()), wanted);
    let start = noise.below(wanted.len() as u64) as usize;
    let end = start + noise.below((wanted.len() - start) as u64 + 1) as usize;
    assert_eq!(values(store, start, end), wanted[start..end]);
}

/// That integers in groups come out as they went in.
fn check_rows(
    encoding: Encoding,
    shape: &[u64],
    matrix: Matrix,
    block: [u64; 2],
    rows: &Rows,
    g_idx: Option<&[u32]>,
    noise: &mut Noise,
) {
    let across = matrix.blocks(block)[1];
    let mut tensor = Tensor::new("w", shape.to_vec(), encoding.clone()).unwrap();
    if let Encoding::Sparse(_) = encoding {
        tensor.parts[2].segment.bytes = rows.codes.chunks_exact(matrix.cols as usize).map(sign_bytes).sum();
    }
    let contents = fill(&tensor, |put| {
        let (mut from, mut at) = (0, 0);
        while from < matrix.rows {
            let to = from + 1 + noise.below(matrix.rows - from);
            let some = part(rows, matrix, across, from, to);
            match &encoding {
                Encoding::Integers(e) => put_integers(e, shape, from, &some, g_idx, put)?,
                Encoding::Ternary(e) => put_ternary(e, shape, from, &some, put)?,
                Encoding::Sparse(e) => put_sparse(e, shape, from, &mut at, &some, put)?,
                _ => panic!(),
            }
            from = to;
        }
        Ok(())
    });
    let (store, back, _dir) = stored(tensor, contents);
    assert_eq!(back.encoding, encoding);
    let (grouped, files) = store.grouped(store.get("w").unwrap()).unwrap();
    let mut read = Rows::default();
    let (from, to) = (noise.below(matrix.rows), matrix.rows);
    read.read(&**grouped, files, from..to).unwrap();
    assert_eq!(read, part(rows, matrix, across, from, to));
    assert_eq!(grouped.groups(files).unwrap().as_deref(), g_idx);
    let value = |i: usize| {
        let (row, col) = (i / matrix.cols as usize, i % matrix.cols as usize);
        let group = g_idx.map_or(col / block[1] as usize, |list| list[col] as usize);
        let at = row * across as usize + group;
        (f32::from(rows.codes[i]) - rows.zeros[at]) * rows.scales[at]
    };
    let wanted: Vec<f32> = (0..rows.codes.len()).map(value).collect();
    check_values(&store, &wanted, noise);
}

fn block_of(noise: &mut Noise, matrix: Matrix) -> [u64; 2] {
    // Mostly groups within a row.
    let high = if noise.below(3) == 0 { 1 + noise.below(matrix.rows) } else { 1 };
    let wide = if noise.below(3) == 0 { matrix.cols } else { 1 + noise.below(matrix.cols) };
    [high, wide]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn integers_come_back(shape in shapes(), bits in 1u32..=8, scales in prop::sample::select(SCALES.to_vec()), kind in 0usize..6, seed: u64, g_idx: bool) {
        let noise = &mut Noise(seed);
        let matrix = Matrix::of(&shape, false).unwrap();
        let block = block_of(noise, matrix);
        let zeros = match kind {
            0 => Zeros::Middle,
            1 => Zeros::Codes(0),
            2 => Zeros::Codes(1),
            k => Zeros::Numbers(SCALES[k - 3]),
        };
        let zero = |noise: &mut Noise| match zeros {
            Zeros::Middle => (1u32 << (bits - 1)) as f32,
            Zeros::Codes(more) => f32::from(u16::from(noise.code(1 << bits)) + u16::from(more)),
            Zeros::Numbers(dtype) => noise.number(dtype),
        };
        let rows = rows(noise, matrix, block, 1 << bits, scales, zero);
        let groups = matrix.blocks(block)[1];
        let list: Option<Vec<u32>> = g_idx.then(|| (0..matrix.cols).map(|_| noise.below(groups) as u32).collect());
        let e = Integers { bits, block, scales, zeros, g_idx };
        check_rows(Encoding::Integers(e), &shape, matrix, block, &rows, list.as_deref(), noise);
    }

    #[test]
    fn ternary_digits_come_back(shape in shapes(), kind in 0..3, scales in prop::sample::select(SCALES.to_vec()), zeros in 0u32..5, seed: u64) {
        let noise = &mut Noise(seed);
        let matrix = Matrix::of(&shape, false).unwrap();
        let block = block_of(noise, matrix);
        let mut rows = rows(noise, matrix, block, 3, scales, |_| 1.0);
        rows.codes.iter_mut().for_each(|c| if noise.code(5) < zeros as u8 { *c = 1 });
        let encoding = match kind {
            0 => Encoding::Ternary(Ternary { packing: Trits::Base3, block, scales }),
            1 => Encoding::Ternary(Ternary { packing: Trits::Bits2, block, scales }),
            _ => Encoding::Sparse(Sparse { block, scales }),
        };
        check_rows(encoding, &shape, matrix, block, &rows, None, noise);
    }

    #[test]
    fn numbers_of_tables_come_back(
        shape in shapes(),
        bits in 1u32..=8,
        flat: bool,
        scales in prop::sample::select(vec![None, Some(DType::F16), Some(DType::BF16), Some(DType::F32), Some(DType::F8_E8M0)]),
        nested: bool,
        seed: u64,
    ) {
        let noise = &mut Noise(seed);
        let matrix = Matrix::of(&shape, flat).unwrap();
        let block = if scales.is_none() { [matrix.rows, matrix.cols] } else { block_of(noise, matrix) };
        let [down, across] = matrix.blocks(block);
        let nested = (nested && scales == Some(DType::F32)).then(|| Nested { block: 1 + noise.below(down * across) });
        let tables = block_of(noise, matrix);
        let e = Codebook { bits, block, flat, scales, nested, table: DType::F32, tables };
        let tensor = Tensor::new("w", shape.clone(), Encoding::Codebook(e.clone())).unwrap();
        let n = matrix.rows * matrix.cols;
        let codes: Vec<u8> = (0..n).map(|_| noise.code(1 << bits)).collect();
        let mut contents = fill(&tensor, |put| {
            let unit = if flat { 8 } else { matrix.cols };
            let cut = (noise.below(n + 1) / unit * unit) as usize;
            put_codebook(&e, &shape, 0, &codes[..cut], put)?;
            put_codebook(&e, &shape, cut as u64, &codes[cut..], put)
        });
        let mut given: Vec<Vec<f32>> = vec![Vec::new()];
        for (part, bytes) in tensor.parts.iter().zip(&mut contents).skip(1) {
            if part.name == "scales" && nested.is_some() {
                bytes.iter_mut().for_each(|b| *b = noise.code(256));
                given.push(bytes.iter().map(|b| f32::from(*b)).collect());
                continue;
            }
            let dtype = if part.name == "scales" { scales.unwrap() } else { DType::F32 };
            let size = dtype.type_size() as usize;
            let numbers: Vec<f32> = (0..bytes.len() / size).map(|_| noise.number(dtype)).collect();
            for (bytes, x) in bytes.chunks_exact_mut(size).zip(&numbers) {
                match dtype {
                    DType::F16 => bytes.copy_from_slice(&f16_from_f32(*x).to_le_bytes()),
                    DType::BF16 => bytes.copy_from_slice(&bf16_from_f32(*x).to_le_bytes()),
                    DType::F8_E8M0 => bytes[0] = (x.to_bits() >> 23) as u8,
                    _ => bytes.copy_from_slice(&x.to_le_bytes()),
                }
            }
            given.push(numbers);
        }
        let value = |i: u64| {
            let (row, col) = (i / matrix.cols, i % matrix.cols);
            let at = |block: [u64; 2]| (row / block[0] * matrix.blocks(block)[1] + col / block[1]) as usize;
            let x = given[1][(at(tables) << bits) + usize::from(codes[i as usize])];
            match nested {
                _ if scales.is_none() => x,
                None => x * given[2][at(block)],
                Some(nested) => {
                    let scale = given[3][given[2][at(block)] as usize] * given[4][at(block) / nested.block as usize];
                    x * (scale + given[5][0])
                }
            }
        };
        let wanted: Vec<f32> = (0..n).map(value).collect();
        let (store, back, _dir) = stored(tensor, contents);
        prop_assert_eq!(back.encoding, Encoding::Codebook(e));
        check_values(&store, &wanted, noise);
    }

    #[test]
    fn scaled_elements_come_back(shape in shapes(), scales in prop::sample::select(SCALES[..3].to_vec()), divisor in prop::sample::select(vec![1u64, 127]), seed: u64) {
        let noise = &mut Noise(seed);
        let matrix = Matrix::of(&shape, false).unwrap();
        let block = block_of(noise, matrix);
        let e = Scaled { dtype: DType::I8, block, scales, divisor };
        let tensor = Tensor::new("w", shape.clone(), Encoding::Scaled(e.clone())).unwrap();
        let data: Vec<u8> = (0..matrix.rows * matrix.cols).map(|_| noise.code(256)).collect();
        let mut contents = fill(&tensor, |put| put_scaled(&e, &shape, 0, &data, put));
        let size = scales.type_size() as usize;
        let numbers: Vec<f32> = (0..contents[1].len() / size).map(|_| noise.number(scales)).collect();
        contents[1] = numbers
            .iter()
            .flat_map(|x| match scales {
                DType::F16 => f16_from_f32(*x).to_le_bytes().to_vec(),
                DType::BF16 => bf16_from_f32(*x).to_le_bytes().to_vec(),
                _ => x.to_le_bytes().to_vec(),
            })
            .collect();
        let value = |i: usize| {
            let (row, col) = (i as u64 / matrix.cols, i as u64 % matrix.cols);
            let scale = numbers[(row / block[0] * matrix.blocks(block)[1] + col / block[1]) as usize];
            let product = f32::from(data[i] as i8) * scale;
            if divisor == 1 { product } else { product * (1.0 / divisor as f32) }
        };
        let wanted: Vec<f32> = (0..data.len()).map(value).collect();
        let (store, _, _dir) = stored(tensor, contents);
        check_values(&store, &wanted, noise);
    }
}

/// A whole file as text: bytes in hexadecimal, the manifest with a line for each field.
fn dump(bytes: &[u8], manifest: std::ops::Range<usize>) -> String {
    let lines = |range: std::ops::Range<usize>| {
        let line = |(i, line): (usize, &[u8])| {
            let hex: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
            format!("{:06x}  {}\n", range.start + 16 * i, hex.join(" "))
        };
        bytes[range.clone()].chunks(16).enumerate().map(line).collect::<String>()
    };
    let json: serde_json::Value = serde_json::from_slice(&bytes[manifest.clone()]).unwrap();
    format!("{}{json:#}\n{}", lines(0..manifest.start), lines(manifest.end..bytes.len()))
}

/// The specification's example, byte for byte.
#[test]
fn the_bytes_of_a_file() {
    let (manifest, contents) = example();
    let at = *manifest.places().unwrap().last().unwrap() as usize;
    let (bytes, _) = file(manifest, &contents, &[]);
    let found = dump(&bytes, at..bytes.len() - 128);
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/qpack/example.txt");
    if std::env::var_os("QCONV_UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &found).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), found, "QCONV_UPDATE=1 writes it anew");
}

#[test]
fn threads_do_not_show() {
    let (manifest, contents) = example();
    let (bytes, seal) = file(manifest.clone(), &contents, &[]);
    for threads in [0, 1, 2, 16] {
        assert_eq!(file_on(threads, manifest.clone(), &contents, &[]), (bytes.clone(), seal), "{threads}");
    }
}

/// Rows and groups of lengths that no other layout takes.
#[test]
fn rounded_weights_are_laid_out() {
    let noise = &mut Noise(7);
    for (bits, symmetric) in [(2, false), (3, true), (4, true), (5, false), (8, true)] {
        for (cols, group_size) in [(2880, Some(96)), (100, Some(48)), (77, None), (3, Some(128))] {
            let grid = Grid { levels: 1 << bits, group_size, symmetric, least_zero: 0 };
            let layout = QpackIntegers { grid, scales: DType::F16, ordered: false };
            let weights: Vec<f32> = (0..5 * cols).map(|_| noise.number(DType::F32)).collect();
            let mut rows = Rows::default();
            round(&grid, &weights, cols, &mut rows).unwrap();
            let e = layout.encoding(5, cols).unwrap();
            let tensor = Tensor::new("w", vec![5, cols], e).unwrap();
            let parts = layout.parts(5, cols).unwrap();
            assert!(parts.iter().map(|p| &p.suffix).eq(tensor.parts.iter().map(|p| &p.name)));
            let contents = fill(&tensor, |put| {
                layout.write([5, cols], 0, Data::Integers(&rows), put)?;
                Ok(())
            });
            let (store, _, _dir) = stored(tensor, contents);
            let (grouped, files) = store.grouped(store.get("w").unwrap()).unwrap();
            let mut read = Rows::default();
            read.read(&**grouped, files, 0..5).unwrap();
            assert_eq!(read, rows);
        }
    }
}

#[test]
fn inspect_lists_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("any name");
    let (manifest, contents) = example();
    std::fs::write(&path, file(manifest, &contents, &[]).0).unwrap();
    let report = inspect(&path, &Limits::default()).unwrap();
    assert_eq!(report.format, "qpack");
    assert_eq!(report.container["side_files"], serde_json::json!(["config.json"]));
    assert_eq!(report.metadata["tool"], "qconv");
    let names: Vec<&str> = report.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["norm", "q / codes", "q / scales", "q / zeros", "t / codes", "t / scales"]);
    let packed = report.quantization.unwrap();
    let found: Vec<_> = packed.matrices.iter().map(|m| (m.name.as_str(), m.bits, m.block, m.bytes)).collect();
    assert_eq!(found, [("q", 3, [1, 4], 16), ("t", 2, [1, 0], 8)]);
    assert_eq!(report.totals.parameters, 3 + 12 + 14);
}

#[test]
fn files_of_a_size() {
    let dir = tempfile::tempdir().unwrap();
    let (manifest, contents) = example();
    let values = |path: &std::path::Path| {
        let (store, _) = open(path, &Limits::default()).unwrap();
        let read = |n: &str| store.read_all(store.get(n).unwrap()).unwrap();
        ["norm", "q", "t"].map(read)
    };
    let whole = dir.path().join("whole");
    std::fs::write(&whole, file(manifest.clone(), &contents, &[]).0).unwrap();
    for (max, count) in [(u64::MAX, 1), (36, 1), (35, 2), (28, 2), (20, 3), (0, 3)] {
        let stem = format!("m{max}");
        let laid = layout(&stem, manifest.clone(), max, Default::default()).unwrap();
        assert_eq!((laid.files.len(), laid.places.len(), laid.index), (count, 7, None), "{max}");
        let mut seals = Vec::new();
        for (k, f) in laid.files.into_iter().enumerate() {
            let bytes = std::sync::Mutex::new(vec![0; f.len as usize]);
            let write = |at: u64, from: &[u8]| {
                bytes.lock().unwrap()[at as usize..][..from.len()].copy_from_slice(from);
                Ok(())
            };
            let read = |at: u64, out: &mut [u8]| {
                out.copy_from_slice(&bytes.lock().unwrap()[at as usize..][..out.len()]);
                Ok(())
            };
            write(0, &f.header).unwrap();
            for (content, (_, at)) in contents.iter().zip(&laid.places).filter(|(_, (of, _))| *of == k) {
                write(*at, content).unwrap();
            }
            f.ending.unwrap().write(2, &mut seals, &read, &write, &|_| true).unwrap();
            let path = dir.path().join(&f.name);
            std::fs::write(&path, bytes.lock().unwrap().as_slice()).unwrap();
            if k + 1 == count {
                assert_eq!(values(&path), values(&whole), "{max}");
            }
        }
    }
}

/// A segment in planes of elements of so many bytes.
fn compressed(content: &[u8], size: u64) -> (Segment, Vec<u8>) {
    let planes = Planes::of(size);
    let (mut bytes, mut entries) = (Vec::new(), Vec::new());
    content.chunks(planes.chunk as usize).for_each(|c| planes.compress(c, &mut bytes, &mut entries));
    bytes.extend(entries.iter().flat_map(|e| e.to_le_bytes()));
    let mut more = serde_json::Map::new();
    more.insert("planes".into(), size.into());
    more.insert("chunk".into(), planes.chunk.into());
    let sha256 = Sha256::digest(content).into();
    let compression =
        Compression { kind: KIND.into(), bytes: content.len() as u64, sha256, more: more.into() };
    (Segment { compression: Some(compression), ..Segment::plain(bytes.len() as u64) }, bytes)
}

#[test]
fn compressed_segments_are_read_like_others() {
    let noise = &mut Noise(5);
    let (shape, block) = (vec![700u64, 1000], [1, 1000]);
    let matrix = Matrix::of(&shape, false).unwrap();
    let mut rows = rows(noise, matrix, block, 3, DType::F16, |_| 1.0);
    // Most are 0.
    rows.codes.iter_mut().for_each(|c| {
        if noise.below(8) > 0 {
            *c = 1
        }
    });
    let e = Ternary { packing: Trits::Base3, block, scales: DType::F16 };
    let t = Tensor::new("t", shape.clone(), Encoding::Ternary(e.clone())).unwrap();
    let floats: Vec<u8> = (0..1_500_000)
        .flat_map(|_| bf16_from_f32(noise.next() as f32 / (1u64 << 31) as f32).to_le_bytes())
        .collect();
    let w = Tensor::new("w", vec![3, 500_000], Encoding::Plain(DType::BF16)).unwrap();
    let contents = fill(&t, |put| put_ternary(&e, &shape, 0, &rows, put));
    let text = b"the same again ".repeat(1000);
    let mut manifest = Manifest {
        files: vec![made::side_file("a/b.txt", &text)],
        tensors: vec![t, w],
        ..Manifest::default()
    };
    let shrink = |segment: &mut Segment, content: &[u8], size: u64| {
        let (made, bytes) = compressed(content, size);
        assert!(bytes.len() < content.len());
        *segment = made;
        bytes
    };
    let segments = vec![
        shrink(&mut manifest.files[0].segment, &text, 1),
        shrink(&mut manifest.tensors[0].parts[0].segment, &contents[0], 1),
        contents[1].clone(),
        shrink(&mut manifest.tensors[1].parts[0].segment, &floats, 2),
    ];
    // One digit in 12 is not 0: half a bit for each, where base 3 takes 1.6.
    assert!(segments[1].len() * 10 < contents[0].len() * 4, "{} {}", segments[1].len(), contents[0].len());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qpack");
    std::fs::write(&path, file(manifest, &segments, &[]).0).unwrap();
    let model = Qpack::open(&path, &Limits::default()).unwrap();
    assert!(model.verify(2, &|_| true).unwrap().is_empty());
    assert_eq!(model.read_file("a/b.txt", &Limits::default()).unwrap(), text);
    let (store, _) = open(&path, &Limits::default()).unwrap();
    assert!(store.read_all(store.get("w").unwrap()).unwrap() == floats);
    let mut some = vec![0; 100];
    store.read(store.get("w").unwrap(), (1 << 20) - 50, &mut some).unwrap();
    assert_eq!(some, floats[(1 << 20) - 50..][..100]);
    let (grouped, files) = store.grouped(store.get("t").unwrap()).unwrap();
    let mut read = Rows::default();
    read.read(&**grouped, files, 0..700).unwrap();
    assert!(read == rows);
}

/// `fixtures/qpack/make.py` knows the specification only.
#[test]
fn what_another_writer_wrote() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/qpack");
    let path = folder.join("all.qpack");
    let sums: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("all.json")).unwrap()).unwrap();
    let model = Qpack::open(&path, &Limits::default()).unwrap();
    assert_eq!(model.verify(2, &|_| true).unwrap(), []);
    assert_eq!(model.seals().next().unwrap().1, 13);
    assert_eq!(model.read_file("notes/any.txt", &Limits::default()).unwrap(), b"Any bytes at all.\n");
    let (store, tensors) = open(&path, &Limits::default()).unwrap();
    let mut kinds = std::collections::BTreeSet::new();
    for tensor in &tensors {
        let name = tensor.name.as_str();
        let Some(wanted) = sums.get(name) else {
            assert_eq!(tensor.encoding.kind(), "of a later time");
            assert_eq!(store.read_all(store.get("later / x").unwrap()).unwrap(), [1, 2, 3]);
            continue;
        };
        let info = store.get(name).unwrap();
        let mut values = vec![0f32; info.elements() as usize];
        codec(info.dtype).unwrap().decode(&store.read_all(info).unwrap(), &mut values).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let found: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, wanted.as_str().unwrap(), "{name}");
        kinds.insert(tensor.encoding.kind());
    }
    assert_eq!((tensors.len(), kinds.len()), (22, 6));
}
