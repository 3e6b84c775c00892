//! Encodings of `.qpack` from weights: what is written decodes to what the layout says it stored.

#[path = "common/qpack.rs"]
mod made;
#[path = "common/raw.rs"]
mod raw;

use std::sync::Arc;

use made::{Contents, fill, write};
use proptest::prelude::*;
use qconv::block::{codec, f16_from_f32, f32_from_f16};
use qconv::container::grouped::Rows;
use qconv::container::qpack::{Segment, Tensor};
use qconv::convert::{Quantize, Quantizer, Recipe};
use qconv::limits::Limits;
use qconv::packed::qpack::open;
use qconv::packed::write::{
    Bnb4, Data, Format, IntegerData, Integers, Layout, QpackEncoding, Regrid, Target, lost, round, weigh,
};
use qconv::tensor::DType;

/// Numbers about 0, most of them small.
fn noise(n: u64, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| (next() + next() + next()) * 0.02).collect()
}

/// Some of the rows.
fn part(rows: &Rows, all: u64, from: u64, to: u64) -> Rows {
    let cut = |n: usize| n / all as usize * from as usize..n / all as usize * to as usize;
    Rows {
        codes: rows.codes[cut(rows.codes.len())].to_vec(),
        scales: rows.scales[cut(rows.scales.len())].to_vec(),
        zeros: rows.zeros[cut(rows.zeros.len())].to_vec(),
    }
}

/// What is written.
#[derive(Clone, Copy)]
enum Given<'a> {
    Weights(&'a [f32]),
    Rows(&'a Rows),
}

/// The tensor that a layout writes, in pieces of so many of its units, the last piece first; and what it says is
/// lost.
fn written(layout: &dyn Layout, shape: [u64; 2], given: Given<'_>, step: u64) -> (Tensor, Contents, f64) {
    let [rows, cols] = shape;
    let encoding = layout.encoding(rows, cols).unwrap();
    let mut tensor = Tensor::new("w", shape.to_vec(), encoding).unwrap();
    let parts = layout.parts(rows, cols).unwrap();
    assert_eq!(parts.len(), tensor.parts.len());
    for (own, part) in tensor.parts.iter_mut().zip(parts) {
        assert_eq!(own.name, part.suffix);
        let bytes = part.dtype.nbytes(&part.shape).unwrap();
        assert!(bytes == own.segment.bytes || part.suffix == "signs" && bytes < own.segment.bytes);
        own.segment = Segment::plain(bytes);
    }
    let mut loss = 0.0;
    let step = step * layout.unit(cols);
    let contents = fill(&tensor, |put| {
        for from in (0..rows).step_by(step as usize).collect::<Vec<_>>().into_iter().rev() {
            let to = rows.min(from + step);
            loss += match given {
                Given::Weights(weights) => {
                    let weights = &weights[(from * cols) as usize..(to * cols) as usize];
                    layout.write(shape, from, Data::Weights(weights), put)?
                }
                Given::Rows(all) => {
                    layout.write(shape, from, Data::Integers(&part(all, rows, from, to)), put)?
                }
            };
        }
        Ok(())
    });
    (tensor, contents, loss)
}

/// The values of a stored tensor, and its integers if it has some.
fn decoded(tensor: Tensor, contents: Contents) -> (Vec<f32>, Option<Rows>) {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), vec![(tensor, contents)]);
    let (store, _) = open(&path, &Limits::default()).unwrap();
    let info = store.get("w").unwrap();
    let values = store.read_all(info).unwrap();
    let values = values.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let integers = store.grouped(info).map(|(grouped, stored)| {
        let mut rows = Rows::default();
        rows.read(&**grouped, stored, 0..grouped.shape().rows).unwrap();
        rows
    });
    (values, integers)
}

fn bits_per_weight(tensor: &Tensor) -> f64 {
    let bytes: u64 = tensor.parts.iter().map(|p| p.segment.bytes).sum();
    (8 * bytes) as f64 / tensor.shape.iter().product::<u64>() as f64
}

fn target(encoding: QpackEncoding, bits: u32, group_size: Option<u64>, symmetric: bool) -> Target {
    let format = Format::Qpack(encoding);
    let own = Target::new(format);
    Target {
        bits: if encoding == QpackEncoding::Integers { bits } else { own.bits },
        group_size: if format.has_groups() { group_size } else { own.group_size },
        symmetric: symmetric && bits > 1 || encoding != QpackEncoding::Integers,
        ..own
    }
}

fn encodings() -> impl Iterator<Item = QpackEncoding> {
    let all = QpackEncoding::NAMES.iter().map(|(_, e)| *e);
    // It is for weights that are ternary already.
    all.filter(|e| *e != QpackEncoding::Sparse)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_lost_is_what_is_said(
        seed: u64,
        rows in 1u64..150,
        cols in 1u64..150,
        bits in 1u32..=8,
        group_size in prop::sample::select(vec![None, Some(1u64), Some(7), Some(32), Some(64), Some(1000)]),
        symmetric: bool,
        step in 1u64..5,
        weighed: bool,
    ) {
        let weights = noise(rows * cols, seed);
        let importance: Vec<f32> = noise(cols, seed ^ 1).iter().map(|x| x * x).collect();
        for encoding in encodings() {
            let target = target(encoding, bits, group_size, symmetric);
            target.check().unwrap();
            let layout = target.layout(&[[rows, cols]], "float16").unwrap();
            let shape = [rows, cols];
            let Some(grid) = layout.grid() else {
                let (tensor, contents, loss) = written(&*layout, shape, Given::Weights(&weights), step);
                let (values, _) = decoded(tensor, contents);
                let wanted = lost(&weights, &values);
                prop_assert!((loss - wanted).abs() <= 1e-9 * wanted, "{encoding:?}: {loss} {wanted}");
                continue;
            };
            let mut found = Rows::default();
            match weighed {
                true => weigh(grid, &weights, cols, &importance, &mut found).unwrap(),
                false => round(grid, &weights, cols, &mut found).unwrap(),
            }
            let (tensor, contents, loss) = written(&*layout, shape, Given::Rows(&found), step);
            prop_assert_eq!(loss, 0.0);
            let (values, read) = decoded(tensor, contents);
            prop_assert!(read.as_ref() == Some(&found));
            let mut wanted = vec![0.0; weights.len()];
            found.all_weights(&grid.shape(rows, cols), &mut wanted);
            prop_assert!(values == wanted);
        }
    }

    /// What was written once is on its own grid.
    #[test]
    fn what_is_stored_is_stored_again(seed: u64, rows in 1u64..9, cols in 1u64..150, group in 1u64..99) {
        let shape = [rows, cols];
        let weights = noise(rows * cols, seed);
        for encoding in [QpackEncoding::NAMES[1].1, QpackEncoding::Nf4, QpackEncoding::Fp4] {
            let target = target(encoding, 4, Some(group), true);
            let layout = target.layout(&[shape], "float16").unwrap();
            let once = |weights: &[f32]| {
                let mut found = Rows::default();
                let given = match layout.grid() {
                    Some(grid) => {
                        round(grid, weights, cols, &mut found).unwrap();
                        Given::Rows(&found)
                    }
                    None => Given::Weights(weights),
                };
                let (tensor, contents, _) = written(&*layout, shape, given, 1);
                (contents.clone(), decoded(tensor, contents).0)
            };
            let (_, values) = once(&weights);
            let (second, again) = once(&values);
            let (third, _) = once(&again);
            prop_assert!(values == again && second == third, "{encoding:?}");
        }
    }

    /// Signs are counted, whatever is 0.
    #[test]
    fn sparse_rows_have_their_lengths(
        seed: u64,
        rows in 1u64..150,
        cols in 1u64..40,
        group_size in prop::sample::select(vec![None, Some(1u64), Some(16)]),
        threshold in 0f32..0.06,
        step in 1u64..3,
    ) {
        let layout = target(QpackEncoding::Sparse, 2, group_size, true).layout(&[], "float16").unwrap();
        let shape = layout.grid().unwrap().shape(rows, cols);
        let digit = |w: &f32| if w.abs() < threshold { 1 } else { if *w < 0.0 { 0 } else { 2 } };
        let n = (rows * shape.groups) as usize;
        let given = Rows {
            codes: noise(rows * cols, seed).iter().map(digit).collect(),
            scales: noise(n as u64, seed ^ 1).iter().map(|x| f32_from_f16(f16_from_f32(*x))).collect(),
            zeros: vec![1.0; n],
        };
        let used: Vec<u64> =
            given.codes.chunks(cols as usize).map(|row| row.iter().filter(|c| **c != 1).count() as u64).collect();
        let layout = layout.counted(&used).unwrap();
        let (tensor, contents, _) = written(&*layout, [rows, cols], Given::Rows(&given), step);
        let (_, read) = decoded(tensor, contents);
        prop_assert!(read == Some(given));
    }
}

/// A codebook is bitsandbytes' own where rows have whole groups of 64.
#[test]
fn codebooks_are_those_of_bitsandbytes() {
    let shape = [6, 192];
    let weights = noise(6 * 192, 5);
    for (fp4, encoding) in [(false, QpackEncoding::Nf4), (true, QpackEncoding::Fp4)] {
        let layout = Target::new(Format::Qpack(encoding)).layout(&[shape], "float16").unwrap();
        let (tensor, contents, loss) = written(&*layout, shape, Given::Weights(&weights), 1);
        let other = Bnb4 { fp4, compute: "float16".into(), nested: None };
        let sizes = other.parts(6, 192).unwrap();
        let mut parts: Contents =
            sizes.iter().map(|p| vec![0; p.dtype.nbytes(&p.shape).unwrap() as usize]).collect();
        let own = other.write(shape, 0, Data::Weights(&weights), &mut |part, at, bytes| {
            parts[part][at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        });
        assert!((own.unwrap() - loss).abs() <= 1e-12 * loss);
        // Halves of bytes are in the other order.
        let swapped: Vec<u8> = parts[0].iter().map(|b| b.rotate_left(4)).collect();
        assert_eq!((&contents[0], &contents[1], &contents[2]), (&swapped, &parts[2], &parts[1]));
        assert!((bits_per_weight(&tensor) - 4.5).abs() < 0.5);
    }
}

/// The experts of a model like gpt-oss, but smaller: rows of 2880, which fill no blocks of GGUF's ternary types.
#[test]
fn ternary_experts_with_rows_of_2880() {
    for (stack, rows) in [(4, 36), (4, 18)] {
        let shape = [stack * rows, 2880];
        let digits: Vec<u8> =
            noise(shape[0] * shape[1], rows).iter().map(|w| ((w * 1e5) as i32).rem_euclid(3) as u8).collect();
        for (group_size, bits) in [(None, 1.6), (Some(128), 1.6)] {
            let layout = |e| target(e, 2, group_size, true).layout(&[shape], "float16").unwrap();
            let base3 = layout(QpackEncoding::Ternary(qconv::container::qpack::Trits::Base3));
            let size = base3.grid().unwrap().shape(shape[0], shape[1]);
            let lines = (size.rows * size.groups) as usize;
            let scales = noise(lines as u64, 9);
            let scales = scales.iter().map(|x| f32_from_f16(f16_from_f32(x.abs() + 1e-3)));
            let given = Rows { codes: digits.clone(), scales: scales.collect(), zeros: vec![1.0; lines] };
            let mut weights = vec![0.0; digits.len()];
            given.all_weights(&size, &mut weights);
            // The weights alone tell the digits.
            let mut found = Rows::default();
            round(base3.grid().unwrap(), &weights, 2880, &mut found).unwrap();
            assert_eq!(found, given);
            let (tensor, contents, _) = written(&*base3, shape, Given::Rows(&found), 5);
            let of_scales = 16.0 * size.groups as f64 / 2880.0;
            assert!(
                (bits_per_weight(&tensor) - bits - of_scales).abs() < 1e-9,
                "{}",
                bits_per_weight(&tensor)
            );
            assert!(decoded(tensor, contents) == (weights, Some(given)));
        }
    }
}

/// In GGUF such rows have the type that stands in for the ternary ones: nearly three times the bits.
#[test]
fn gguf_has_other_types_for_rows_of_2880() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let file = raw::Raw::llama().info("blk.0.ffn_up_exps.weight", &[2880, 18, 4], 0, 0);
    std::fs::write(&path, file.with_data(2880 * 18 * 4 * 4).bytes()).unwrap();
    for name in ["tq1_0", "tq2_0"] {
        let quantizer = Quantizer::new(Recipe::parse(name).unwrap());
        let plan = Quantize::new(&path, dir.path().join("q.gguf"), quantizer).plan().unwrap().plan;
        let [experts] = &plan.tensors[..] else { unreachable!() };
        assert_eq!((experts.dtype, experts.nbytes * 8), (DType::Q4_0, 2880 * 18 * 4 * 9 / 2));
    }
}

/// Blocks of GGUF's ternary types keep their digits, also where the scale is 0 or negative.
#[test]
fn ternary_blocks_keep_their_codes() {
    let shape = [3, 512];
    let weights = noise(3 * 512, 8);
    for dtype in [DType::TQ1_0, DType::TQ2_0] {
        let mut blocks = vec![0; dtype.bytes_for(3 * 512).unwrap() as usize];
        codec(dtype).unwrap().encode(&weights, 512, None, &mut blocks).unwrap();
        let size = dtype.type_size() as usize;
        for (k, scale) in [(1, 0.0), (2, -2.5)] {
            blocks[k * size + size - 2..(k + 1) * size].copy_from_slice(&f16_from_f32(scale).to_le_bytes());
        }
        let mut values = vec![0f32; 3 * 512];
        codec(dtype).unwrap().decode(&blocks, &mut values).unwrap();
        let integers = Integers::blocks(dtype, 3, 512).unwrap();
        let mut rows = Rows::default();
        integers.read(IntegerData::Blocks(&blocks), 0..3, &mut rows).unwrap();
        for encoding in encodings().filter(|e| Format::Qpack(*e).has_grid()) {
            let layout = target(encoding, 2, Some(256), encoding != QpackEncoding::Integers);
            let layout = layout.layout(&[shape], "float16").unwrap();
            let regrid = Regrid::new(&integers, &*layout, None).unwrap();
            assert!(regrid.holds(&rows));
            let mut moved = Rows::default();
            regrid.apply(&rows, &mut moved).unwrap();
            assert_eq!(moved, rows);
            let (tensor, contents, _) = written(&*layout, shape, Given::Rows(&moved), 1);
            let (found, read) = decoded(tensor, contents);
            assert_eq!((found, read), (values.clone(), Some(rows.clone())), "{dtype} {encoding:?}");
        }
        // Groups of half a block have its scale.
        let halves =
            target(QpackEncoding::NAMES[1].1, 2, Some(128), true).layout(&[shape], "float16").unwrap();
        assert!(Regrid::new(&integers, &*halves, None).unwrap().holds(&rows));
    }
    // TQ2_0 has a code of 3, which is no digit.
    let mut block = vec![0x55u8; 66];
    block[64..].copy_from_slice(&f16_from_f32(1.0).to_le_bytes());
    let integers = Integers::blocks(DType::TQ2_0, 1, 256).unwrap();
    let layout: Arc<dyn Layout> =
        target(QpackEncoding::NAMES[1].1, 2, None, true).layout(&[], "float16").unwrap();
    let regrid = Regrid::new(&integers, &*layout, None).unwrap();
    for (byte, holds) in [(0x55, true), (0x65, true), (0x75, false)] {
        block[0] = byte;
        let mut rows = Rows::default();
        integers.read(IntegerData::Blocks(&block), 0..1, &mut rows).unwrap();
        assert_eq!(regrid.holds(&rows), holds);
    }
}

/// Wider integers all of whose codes are next to their zero are ternary.
#[test]
fn integers_next_to_their_zero_are_ternary() {
    let wide = target(QpackEncoding::Integers, 4, Some(4), false).layout(&[], "float16").unwrap();
    let given = Rows { codes: vec![7, 8, 9, 8, 3, 2, 4, 3], scales: vec![0.5, -0.25], zeros: vec![8.0, 3.0] };
    let (tensor, contents, _) = written(&*wide, [1, 8], Given::Rows(&given), 1);
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), vec![(tensor, contents)]);
    let (store, _) = open(&path, &Limits::default()).unwrap();
    let (grouped, stored) = store.grouped(store.get("w").unwrap()).unwrap();
    let integers = Integers::Grouped(grouped.clone());
    let ternary = target(QpackEncoding::NAMES[1].1, 2, Some(4), true).layout(&[], "float16").unwrap();
    let regrid = Regrid::new(&integers, &*ternary, None).unwrap();
    let (mut rows, mut moved) = (Rows::default(), Rows::default());
    integers.read(IntegerData::Stored(stored), 0..1, &mut rows).unwrap();
    assert!(regrid.needs_codes() && regrid.holds(&rows));
    regrid.apply(&rows, &mut moved).unwrap();
    let wanted = Rows { codes: vec![0, 1, 2, 1, 1, 0, 2, 1], scales: given.scales, zeros: vec![1.0; 2] };
    assert_eq!(moved, wanted);
    rows.codes[6] = 5;
    assert!(!regrid.holds(&rows));
}
