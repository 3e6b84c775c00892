//! The element types of 8 bits F8_E4M3, F8_E5M2 and F8_E8M0. As codecs they are read only: ggml has none
//! of them.
//!
//! Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3 has no infinities, and NaN in the
//! last code of either sign), OCP Microscaling Formats 1.0 (E8M0, a power of two without sign).

use super::Codec;
use super::float::F32;
use crate::tensor::DType;

pub(super) const F8_E4M3: Codec = Codec {
    dtype: DType::F8_E4M3,
    encode: None,
    decode: |src, dst| look_up(&E4M3, src, dst),
    bound: None,
    ..F32
};

pub(super) const F8_E5M2: Codec =
    Codec { dtype: DType::F8_E5M2, decode: |src, dst| look_up(&E5M2, src, dst), ..F8_E4M3 };

pub(super) const F8_E8M0: Codec = Codec {
    dtype: DType::F8_E8M0,
    decode: |src, dst| dst.iter_mut().zip(src).for_each(|(y, code)| *y = power(*code)),
    ..F8_E4M3
};

static E4M3: [f32; 256] = table(3);
static E5M2: [f32; 256] = table(2);

fn look_up(table: &[f32; 256], src: &[u8], dst: &mut [f32]) {
    dst.iter_mut().zip(src).for_each(|(y, code)| *y = table[usize::from(*code)]);
}

/// The value of a code of E4M3.
pub fn f32_from_e4m3(code: u8) -> f32 {
    E4M3[usize::from(code)]
}

/// `2^(code - 127)`, NaN for the last code.
fn power(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// The values of all codes with `mantissa` bits of mantissa.
const fn table(mantissa: u32) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code as usize] = value(code, mantissa);
        code += 1;
    }
    values
}

const fn value(code: u32, mantissa: u32) -> f32 {
    let (sign, magnitude) = (code >> 7 << 31, code & 0x7F);
    let bias = (1 << (6 - mantissa)) - 1;
    let (exponent, fraction) = (magnitude >> mantissa, magnitude & ((1 << mantissa) - 1));
    let special = exponent == (1 << (7 - mantissa)) - 1;
    let bits = if special && mantissa == 2 {
        // As in the larger IEEE types: infinity, or NaN.
        0x7F80_0000 | fraction << 21
    } else if special && fraction == 7 {
        0x7FC0_0000
    } else if exponent > 0 {
        (exponent + 127 - bias) << 23 | fraction << (23 - mantissa)
    } else if fraction == 0 {
        0
    } else {
        // Subnormal: the leading bit becomes the hidden one.
        let top = fraction.ilog2();
        (top + 128 - bias - mantissa) << 23 | (fraction << (23 - top) & 0x007F_FFFF)
    };
    f32::from_bits(sign | bits)
}

/// The next number of E4M3, of two as near the even one; what is beyond 448 becomes 448, NaN stays NaN.
#[inline(always)]
pub fn e4m3_from_f32(x: f32) -> u8 {
    // Both ways are taken and one chosen, that loops may do it side by side.
    let (sign, magnitude) = (x.to_bits() >> 31 << 7, x.abs());
    // Below the least normal number steps are 2^-9. Adding this rounds to an integer.
    let small = (magnitude * 512.0 + 8_388_608.0).to_bits() & 0xFF;
    let limited = if magnitude < 448.0 { magnitude } else { 448.0 };
    let bits = limited.to_bits();
    let rounded = bits.wrapping_add(0x7_FFFF + (bits >> 20 & 1)) >> 20;
    let code = if magnitude < 0.015625 { small } else { rounded.wrapping_sub(120 << 3) };
    let code = if magnitude.is_nan() { 0x7F } else { code };
    (sign | code) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values stated in the specifications' tables of extremes, and powers in between.
    #[test]
    fn known_values() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3C, 1.5),
            (0x7E, 448.0),
            (0xFE, -448.0),
        ] {
            assert_eq!(E4M3[code], value, "{code:#x}");
        }
        for (code, value) in [
            (0x01, 2f32.powi(-16)),
            (0x03, 0.75 * 2f32.powi(-14)),
            (0x04, 2f32.powi(-14)),
            (0x3C, 1.0),
            (0x7B, 57344.0),
            (0x7C, f32::INFINITY),
            (0xFC, f32::NEG_INFINITY),
        ] {
            assert_eq!(E5M2[code], value, "{code:#x}");
        }
        assert!(E4M3[0x7F].is_nan() && E4M3[0xFF].is_nan() && E5M2[0x7D].is_nan() && power(255).is_nan());
        assert!([0, 1, 127, 254].iter().all(|e| f64::from(power(*e)) == 2f64.powi(i32::from(*e) - 127)));
        // Monotone in the magnitude, and the sign is the first bit.
        for table in [&E4M3, &E5M2] {
            assert!((0..0x7B).all(|i| table[i] < table[i + 1] && table[i + 128] == -table[i]));
        }
    }

    #[test]
    fn numbers_become_the_next_code() {
        for (code, value) in E4M3.iter().enumerate().filter(|(_, v)| !v.is_nan()) {
            assert_eq!(e4m3_from_f32(*value), code as u8, "{value}");
        }
        for code in 0..0x7Eu8 {
            let (low, high) = (E4M3[usize::from(code)], E4M3[usize::from(code) + 1]);
            let middle = (low + high) / 2.0;
            let even = code + code % 2;
            assert_eq!(e4m3_from_f32(middle), even, "{middle}");
            assert_eq!(e4m3_from_f32(middle.next_down()), code);
            assert_eq!(e4m3_from_f32(-middle.next_up()), (code + 1) | 0x80);
        }
        assert_eq!([449.0, 1e30, f32::INFINITY].map(e4m3_from_f32), [0x7E; 3]);
        assert_eq!(e4m3_from_f32(f32::NAN) & 0x7F, 0x7F);
    }
}
