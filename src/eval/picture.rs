//! A drawing of lines, dots and words, and its two forms: SVG, in which words stay words, and PNG,
//! for which the letters are built in (Noto Sans Mono), so that no font of the system is needed.

use std::fmt::Write;

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster};

/// Red, green, blue.
pub type Colour = [u8; 3];

/// Where a text's given place lies on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// At its left end.
    Start,
    /// In its middle.
    Middle,
    /// At its right end.
    End,
}

/// How heavy letters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Labels, numbers.
    Regular,
    /// Titles.
    Bold,
}

/// Width and height of every letter's box.
pub const LETTER: (f64, f64) = (7.0, 16.0);

/// Something drawn. Lengths are pixels of the SVG, `y` grows downwards.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// A straight line.
    Line {
        /// One end.
        from: (f64, f64),
        /// The other.
        to: (f64, f64),
        /// Its thickness.
        width: f64,
        /// Its colour.
        colour: Colour,
    },
    /// A filled circle.
    Dot {
        /// The centre.
        at: (f64, f64),
        /// The radius.
        radius: f64,
        /// Its colour.
        colour: Colour,
    },
    /// A line of text.
    Text {
        /// A place on it, at half of the letters' height.
        at: (f64, f64),
        /// Which place that is.
        anchor: Anchor,
        /// How heavy the letters are.
        weight: Weight,
        /// Their colour.
        colour: Colour,
        /// Whether it is read from left to right, else from below upwards.
        upright: bool,
        /// The text.
        text: String,
    },
}

/// Shapes on a white ground.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Pixels of the SVG.
    pub width: u32,
    /// Pixels of the SVG.
    pub height: u32,
    /// From back to front.
    pub shapes: Vec<Shape>,
}

/// Pixels of the PNG for one of the SVG.
const SCALE: u32 = 2;

impl Picture {
    /// As SVG 1.1.
    pub fn to_svg(&self) -> String {
        let (w, h) = (self.width, self.height);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\" \
             font-family=\"'Noto Sans Mono', 'DejaVu Sans Mono', Menlo, Consolas, monospace\">\n\
             <rect width=\"{w}\" height=\"{h}\" fill=\"#ffffff\"/>\n"
        );
        for shape in &self.shapes {
            // Writing to a String cannot fail.
            let _ = match shape {
                Shape::Line { from, to, width, colour } => writeln!(
                    out,
                    "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{}\" stroke-width=\"{width}\"/>",
                    from.0,
                    from.1,
                    to.0,
                    to.1,
                    hex(*colour)
                ),
                Shape::Dot { at, radius, colour } => writeln!(
                    out,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\" fill=\"{}\"/>",
                    at.0,
                    at.1,
                    hex(*colour)
                ),
                Shape::Text { at, anchor, weight, colour, upright, text } => {
                    let weight = match weight {
                        Weight::Regular => "",
                        Weight::Bold => " font-weight=\"bold\"",
                    };
                    let anchor = match anchor {
                        Anchor::Start => "start",
                        Anchor::Middle => "middle",
                        Anchor::End => "end",
                    };
                    let turn = match upright {
                        true => String::new(),
                        false => format!(" transform=\"rotate(-90 {:.1} {:.1})\"", at.0, at.1),
                    };
                    writeln!(
                        out,
                        "<text x=\"{:.1}\" y=\"{:.1}\" dy=\"{:.1}\" font-size=\"{:.1}\" text-anchor=\"{anchor}\"{weight} \
                         fill=\"{}\"{turn}>{}</text>",
                        at.0,
                        at.1,
                        LETTER.1 * 0.25,
                        LETTER.0 / 0.6,
                        hex(*colour),
                        escaped(text)
                    )
                }
            };
        }
        out + "</svg>\n"
    }

    /// As PNG, of twice the size.
    pub fn to_png(&self) -> Vec<u8> {
        let mut canvas = Canvas::new(self.width * SCALE, self.height * SCALE);
        let scale = f64::from(SCALE);
        let scaled = |(x, y): (f64, f64)| (x * scale, y * scale);
        for shape in &self.shapes {
            match shape {
                Shape::Line { from, to, width, colour } => {
                    canvas.stroke(scaled(*from), scaled(*to), width * scale / 2.0, *colour);
                }
                Shape::Dot { at, radius, colour } => {
                    canvas.stroke(scaled(*at), scaled(*at), radius * scale, *colour);
                }
                Shape::Text { at, anchor, weight, colour, upright, text } => {
                    canvas.write(scaled(*at), *anchor, *weight, *colour, *upright, text);
                }
            }
        }
        canvas.to_png()
    }
}

fn hex([r, g, b]: Colour) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// For XML, which has no place for control characters.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '&' => out += "&amp;",
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

/// Pixels, row by row.
struct Canvas {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Canvas {
    fn new(width: u32, height: u32) -> Self {
        Self { width, height, rgb: vec![255; 3 * width as usize * height as usize] }
    }

    /// Lays `colour` over a pixel; outside nothing happens.
    fn blend(&mut self, x: i64, y: i64, colour: Colour, cover: f64) {
        if x < 0 || y < 0 || x >= i64::from(self.width) || y >= i64::from(self.height) {
            return;
        }
        let at = 3 * (y as usize * self.width as usize + x as usize);
        for (old, new) in self.rgb[at..at + 3].iter_mut().zip(colour) {
            *old = (f64::from(*old) + (f64::from(new) - f64::from(*old)) * cover).round() as u8;
        }
    }

    /// What lies within `radius` of the stretch between two points.
    fn stroke(&mut self, from: (f64, f64), to: (f64, f64), radius: f64, colour: Colour) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let length = dx * dx + dy * dy;
        let range = |a: f64, b: f64, most: u32| {
            let low = (a.min(b) - radius - 1.0).max(0.0) as i64;
            low..=((a.max(b) + radius + 1.0).min(f64::from(most)) as i64)
        };
        for y in range(from.1, to.1, self.height) {
            for x in range(from.0, to.0, self.width) {
                let (px, py) = (x as f64 + 0.5 - from.0, y as f64 + 0.5 - from.1);
                let along = if length > 0.0 { ((px * dx + py * dy) / length).clamp(0.0, 1.0) } else { 0.0 };
                let distance = (px - along * dx).hypot(py - along * dy);
                self.blend(x, y, colour, (radius + 0.5 - distance).clamp(0.0, 1.0));
            }
        }
    }

    fn write(
        &mut self,
        at: (f64, f64),
        anchor: Anchor,
        weight: Weight,
        colour: Colour,
        upright: bool,
        text: &str,
    ) {
        let style = match weight {
            Weight::Regular => FontWeight::Regular,
            Weight::Bold => FontWeight::Bold,
        };
        let glyph = |c| get_raster(c, style, RasterHeight::Size32);
        let glyphs: Vec<_> = text.chars().filter_map(|c| glyph(c).or_else(|| glyph('?'))).collect();
        let Some(first) = glyphs.first() else { return };
        let (width, height) = (first.width() as f64 * glyphs.len() as f64, first.height() as f64);
        let begin = match anchor {
            Anchor::Start => 0.0,
            Anchor::Middle => -width / 2.0,
            Anchor::End => -width,
        };
        for (k, glyph) in glyphs.iter().enumerate() {
            for (j, row) in glyph.raster().iter().enumerate() {
                for (i, &cover) in row.iter().enumerate().filter(|(_, c)| **c > 0) {
                    let along = begin + (k * glyph.width() + i) as f64;
                    let across = j as f64 - height / 2.0;
                    let (x, y) =
                        if upright { (at.0 + along, at.1 + across) } else { (at.0 + across, at.1 - along) };
                    self.blend(x.round() as i64, y.round() as i64, colour, f64::from(cover) / 255.0);
                }
            }
        }
    }

    /// The PNG specification, second edition: 8 bits each of red, green and blue.
    fn to_png(&self) -> Vec<u8> {
        let mut header = [self.width.to_be_bytes(), self.height.to_be_bytes()].concat();
        header.extend([8, 2, 0, 0, 0]);
        let mut rows = Vec::with_capacity(self.rgb.len() + self.height as usize);
        for row in self.rgb.chunks_exact(3 * self.width as usize) {
            // No filter.
            rows.push(0);
            rows.extend_from_slice(row);
        }
        let data = miniz_oxide::deflate::compress_to_vec_zlib(&rows, 8);
        let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
        for (name, data) in [(b"IHDR", &header), (b"IDAT", &data), (b"IEND", &Vec::new())] {
            out.extend((data.len() as u32).to_be_bytes());
            let begin = out.len();
            out.extend_from_slice(name);
            out.extend_from_slice(data);
            let sum = crc32(&out[begin..]);
            out.extend(sum.to_be_bytes());
        }
        out
    }
}

/// The checksum of PNG's chunks (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
    !bytes.iter().fold(!0, |crc, &b| (0..8).fold(crc ^ u32::from(b), bit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_have_the_width_that_is_counted_on() {
        for weight in [FontWeight::Regular, FontWeight::Bold] {
            let glyph = get_raster('m', weight, RasterHeight::Size32).unwrap();
            let scale = f64::from(SCALE);
            assert_eq!((glyph.width() as f64, glyph.height() as f64), (LETTER.0 * scale, LETTER.1 * scale));
        }
    }

    #[test]
    fn both_forms_hold_what_was_drawn() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        let red = [255, 0, 0];
        let dot = Shape::Dot { at: (10.0, 5.0), radius: 2.0, colour: red };
        let word = Shape::Text {
            at: (0.0, 5.0),
            anchor: Anchor::Start,
            weight: Weight::Regular,
            colour: [0; 3],
            upright: true,
            text: "<&\u{1}".into(),
        };
        let picture = Picture { width: 20, height: 10, shapes: vec![word, dot] };
        let svg = picture.to_svg();
        assert!(svg.contains("<circle cx=\"10.0\" cy=\"5.0\" r=\"2\" fill=\"#ff0000\"/>"), "{svg}");
        assert!(svg.contains(">&lt;&amp;?</text>"), "{svg}");
        let png = picture.to_png();
        let idat = 8 + 25;
        let len = u32::from_be_bytes(png[idat..idat + 4].try_into().unwrap()) as usize;
        let rows = miniz_oxide::inflate::decompress_to_vec_zlib(&png[idat + 8..idat + 8 + len]).unwrap();
        assert_eq!(rows.len(), 20 * (1 + 3 * 40));
        let pixel = |x: usize, y: usize| &rows[y * 121 + 1 + 3 * x..][..3];
        assert_eq!((pixel(20, 10), pixel(39, 0)), (&[255, 0, 0][..], &[255, 255, 255][..]));
    }
}
