//! Weights of Core ML, encoded into memory, and decoded by the formulas of the operations.
#![allow(dead_code)] // each test uses its part

use std::ops::Range;
use std::sync::Mutex;

use qconv::Result;
use qconv::arch::Mapped;
use qconv::container::Store;
use qconv::container::coreml::DataType;
use qconv::container::coreml::blob::layout;
use qconv::convert::Importance;
use qconv::convert::to_coreml::weights::{Keep, Outcome, Scratch, WeightPlan, Wish};
use qconv::mil::{Encoded, Form, Place, Stored};
use qconv::work::each;

/// An encoded tensor, and the data of its blobs.
pub struct Made {
    pub plan: WeightPlan,
    pub encoded: Encoded,
    pub blobs: Vec<(u64, Vec<u8>)>,
    /// Bytes of the weight file.
    pub file: u64,
    pub outcome: Outcome,
}

/// Plans and writes; every byte of every blob has to be written once.
pub fn encode(
    tensor: &Mapped,
    store: &Store,
    rows: Option<Range<u64>>,
    wish: Wish,
    keep: Keep,
    importance: Option<Importance>,
) -> Result<Made> {
    let plan = WeightPlan::new(tensor, store, rows, wish, keep, importance)?;
    let (file, places) = layout("weight.bin", plan.blobs())?;
    let empty = || places.iter().map(|b| vec![0u8; b.bytes as usize]).collect::<Vec<_>>();
    let (data, times) = (Mutex::new(empty()), Mutex::new(empty()));
    let mut outcome = Outcome::default();
    // The last span first, on several threads: order is of no matter.
    let spans: Vec<usize> = (0..plan.spans()).rev().collect();
    let write = |scratch: &mut Scratch, span: &usize| {
        plan.write(store, *span, scratch, &|blob, at, bytes| {
            let at = at as usize..at as usize + bytes.len();
            data.lock().unwrap()[blob][at.clone()].copy_from_slice(bytes);
            times.lock().unwrap()[blob][at].iter_mut().for_each(|n| *n += 1);
            Ok(())
        })
    };
    each(&spans, 3, Scratch::default, write)?.into_iter().for_each(|of_span| outcome.add(of_span));
    let (data, times) = (data.into_inner().unwrap(), times.into_inner().unwrap());
    assert!(times.iter().flatten().all(|n| *n == 1), "bytes are written once: {times:?}");
    let encoded = plan.encoded("w", &places)?;
    let blobs = places.iter().map(|b| b.record).zip(data).collect();
    Ok(Made { plan, encoded, blobs, file: file.len, outcome })
}

pub fn half(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

impl Made {
    fn bytes<'a>(&'a self, stored: &'a Stored) -> &'a [u8] {
        match &stored.place {
            Place::Immediate(bytes) => bytes,
            Place::File(at) => &self.blobs.iter().find(|(record, _)| record == at).unwrap().1,
        }
    }

    /// Elements as numbers, by their type.
    pub fn numbers(&self, stored: &Stored) -> Vec<f32> {
        let n: u64 = stored.shape.iter().product();
        let bytes = self.bytes(stored);
        assert_eq!(Some(bytes.len() as u64), stored.dtype.bytes(n), "{stored:?}");
        let bits = stored.dtype.bits() as usize;
        let field = |i: usize| {
            (0..bits).fold(0u32, |v, b| {
                let at = i * bits + b;
                v | u32::from(bytes[at / 8] >> (at % 8) & 1) << b
            })
        };
        let signed = |v: u32| (v as i32) << (32 - bits) >> (32 - bits);
        let number = |i: usize| match stored.dtype {
            DataType::Float16 => half::f16::from_bits(field(i) as u16).to_f32(),
            DataType::Int4 | DataType::Int8 => signed(field(i)) as f32,
            _ => field(i) as f32,
        };
        (0..n as usize).map(number).collect()
    }

    /// The weights.
    pub fn decode(&self) -> Vec<f32> {
        let shape = &self.encoded.shape;
        let n = shape.iter().product::<u64>() as usize;
        // The element of a smaller operand that belongs to an element of the whole.
        let group = |parts: &[u64], i: usize| {
            let (mut rest, mut at, mut size) = (i as u64, 0, 1);
            for (n, g) in shape.iter().zip(parts).rev() {
                assert!(n % g == 0, "{shape:?} {parts:?}");
                at += rest % n / (n / g) * size;
                (rest, size) = (rest / n, size * g);
            }
            at as usize
        };
        let entry = |lut: &Stored, table: &[f32], i: usize, index: usize| {
            let [parts @ .., entries, 1] = &lut.shape[..] else { panic!("{lut:?}") };
            table[group(parts, i) * *entries as usize + index]
        };
        let mut values: Vec<f32> = match &self.encoded.form {
            Form::Plain(values) => self.numbers(values),
            Form::Blockwise { data, scale, offset } => {
                assert!(data.shape == *shape && scale.dtype == DataType::Float16);
                let zeros = offset.as_ref().map(|o| {
                    assert!(o.shape == scale.shape && o.dtype == data.dtype);
                    self.numbers(o)
                });
                let scales = self.numbers(scale);
                let of = |(i, c): (usize, &f32)| {
                    let g = group(&scale.shape, i);
                    half((c - zeros.as_ref().map_or(0.0, |z| z[g])) * scales[g])
                };
                self.numbers(data).iter().enumerate().map(of).collect()
            }
            Form::Lut { indices, lut } => {
                assert!(indices.shape == *shape && lut.shape[shape.len()] == 1 << indices.dtype.bits());
                let table = self.numbers(lut);
                let of = |(i, c): (usize, &f32)| entry(lut, &table, i, *c as usize);
                self.numbers(indices).iter().enumerate().map(of).collect()
            }
            Form::SparseLut { mask, indices, lut } => {
                assert!(mask.shape == *shape && mask.dtype == DataType::UInt1);
                let (table, mut indices) = (self.numbers(lut), self.numbers(indices).into_iter());
                let of = |(i, m): (usize, &f32)| match *m {
                    0.0 => 0.0,
                    _ => entry(lut, &table, i, indices.next().unwrap() as usize),
                };
                let values = self.numbers(mask).iter().enumerate().map(of).collect();
                assert_eq!(indices.next(), None);
                values
            }
        };
        if let Some(after) = &self.encoded.after {
            let scales = self.numbers(after);
            let cols = *shape.last().unwrap() as usize;
            assert_eq!(after.shape[..], shape[..shape.len() - 1]);
            values.chunks_mut(cols).zip(scales).for_each(|(row, s)| row.iter_mut().for_each(|v| *v *= s));
        }
        assert_eq!(values.len(), n);
        values
    }

    /// Bits that a weight takes in blobs.
    pub fn bits(&self) -> f64 {
        let bytes: usize = self.blobs.iter().map(|(_, b)| b.len()).sum();
        bytes as f64 * 8.0 / self.encoded.shape.iter().product::<u64>() as f64
    }
}
