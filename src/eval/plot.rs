//! Divergence over size: several quantizations of one model in a picture.

use super::picture::{Anchor, Colour, LETTER, Picture, Shape, Weight};
use super::score::Estimate;

/// A model.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// What stands beside it.
    pub name: String,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Those in bits, over its weights.
    pub bits_per_weight: f64,
    /// Its divergence from the base.
    pub kld: Estimate,
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 600.0;
/// The area of the points.
const LEFT: f64 = 90.0;
const RIGHT: f64 = WIDTH - 30.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = HEIGHT - 62.0;

const INK: Colour = [40, 40, 40];
const GREY: Colour = [120, 120, 120];
const GRID: Colour = [226, 226, 226];
const BLUE: Colour = [31, 98, 165];
const PALE_BLUE: Colour = [140, 175, 210];

const RADIUS: f64 = 4.0;
/// Longer names are cut.
const LONGEST_NAME: usize = 36;

/// Draws `points` over the base `base`. What does not depart from the base has no place on a
/// logarithmic axis, and is named below.
pub fn kld_over_size(base: &Point, points: &[Point]) -> Picture {
    let (drawn, same): (Vec<&Point>, Vec<&Point>) =
        points.iter().partition(|p| p.kld.value.is_finite() && p.kld.value > 0.0);
    let (unit, unit_name) = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
        .into_iter()
        .find(|(unit, _)| points.iter().any(|p| p.bytes as f64 >= *unit))
        .unwrap_or((1.0, "bytes"));
    let size = |p: &Point| p.bytes as f64 / unit;
    let x = Axis::around(drawn.iter().map(|p| size(p)), LEFT, RIGHT);
    let y = Axis::around(drawn.iter().map(|p| p.kld.value.log10()), BOTTOM, TOP);
    let mut sheet = Sheet::default();

    sheet.text((LEFT, 22.0), Anchor::Start, Weight::Bold, INK, "KL divergence over size");
    let of_base = format!(
        "from {} ({:.2} {unit_name}, {:.2} bits per weight)",
        short(&base.name),
        size(base),
        base.bits_per_weight
    );
    sheet.text((LEFT, 42.0), Anchor::Start, Weight::Regular, GREY, &of_base);
    if !same.is_empty() {
        let names: Vec<String> = same.iter().map(|p| short(&p.name)).collect();
        let none = format!("without a divergence above 0: {}", names.join(", "));
        sheet.text((LEFT, HEIGHT - 9.0), Anchor::Start, Weight::Regular, GREY, &none);
    }
    for tick in x.ticks() {
        let at = x.place(tick);
        sheet.line((at, TOP), (at, BOTTOM), 1.0, GRID);
        sheet.text((at, BOTTOM + 13.0), Anchor::Middle, Weight::Regular, INK, &number(tick));
    }
    for (tick, labelled) in y.decades() {
        let at = y.place(tick.log10());
        sheet.line((LEFT, at), (RIGHT, at), 1.0, GRID);
        if labelled {
            sheet.text((LEFT - 7.0, at), Anchor::End, Weight::Regular, INK, &number(tick));
        }
    }
    // Bits per weight have a scale of their own where all models have as many weights.
    let rate = |p: &Point| p.bits_per_weight / size(p);
    let first = drawn.first().map_or(1.0, |p| rate(p));
    let common = drawn.iter().all(|p| (rate(p) / first - 1.0).abs() < 5e-3);
    if common {
        let bits = Axis { low: x.low * first, high: x.high * first, ..x };
        for tick in bits.ticks() {
            let at = bits.place(tick);
            sheet.line((at, TOP - 4.0), (at, TOP), 1.0, GREY);
            sheet.text((at, TOP - 12.0), Anchor::Middle, Weight::Regular, INK, &number(tick));
        }
        let middle = (f64::midpoint(LEFT, RIGHT), TOP - 29.0);
        sheet.text(middle, Anchor::Middle, Weight::Regular, GREY, "bits per weight");
    }
    for (from, to) in [
        ((LEFT, TOP), (RIGHT, TOP)),
        ((LEFT, BOTTOM), (RIGHT, BOTTOM)),
        ((LEFT, TOP), (LEFT, BOTTOM)),
        ((RIGHT, TOP), (RIGHT, BOTTOM)),
    ] {
        sheet.line(from, to, 1.0, GREY);
    }
    let middle = (f64::midpoint(LEFT, RIGHT), BOTTOM + 33.0);
    sheet.text(middle, Anchor::Middle, Weight::Regular, GREY, &format!("size of the tensors, {unit_name}"));
    sheet.shapes.push(Shape::Text {
        at: (18.0, f64::midpoint(TOP, BOTTOM)),
        anchor: Anchor::Middle,
        weight: Weight::Regular,
        colour: GREY,
        upright: false,
        text: "mean KL divergence, nats".into(),
    });

    let places: Vec<(f64, f64)> =
        drawn.iter().map(|p| (x.place(size(p)), y.place(p.kld.value.log10()))).collect();
    for (p, &(px, py)) in drawn.iter().zip(&places) {
        let ends = [p.kld.value - p.kld.error, p.kld.value + p.kld.error]
            .map(|v| y.place(v.max(f64::MIN_POSITIVE).log10()).clamp(TOP, BOTTOM));
        // Where it would not leave the dot it cannot be seen.
        if ends[0] - ends[1] > 2.0 * RADIUS {
            sheet.line((px, ends[0]), (px, ends[1]), 1.5, PALE_BLUE);
            ends.into_iter().for_each(|e| sheet.line((px - 4.0, e), (px + 4.0, e), 1.5, PALE_BLUE));
        }
        sheet.shapes.push(Shape::Dot { at: (px, py), radius: RADIUS, colour: BLUE });
    }
    let names: Vec<String> = drawn
        .iter()
        .map(|p| match common {
            true => short(&p.name),
            false => format!("{} ({:.2} bits)", short(&p.name), p.bits_per_weight),
        })
        .collect();
    for (label, (&(px, py), name)) in label_places(&places, &names).iter().zip(places.iter().zip(&names)) {
        let near = (px.clamp(label.left, label.right), py.clamp(label.top, label.bottom));
        if (near.0 - px).hypot(near.1 - py) > 3.0 * RADIUS {
            sheet.line((px, py), near, 0.75, PALE_BLUE);
        }
        let at = (label.left + 1.0, f64::midpoint(label.top, label.bottom));
        sheet.text(at, Anchor::Start, Weight::Regular, INK, name);
    }
    Picture { width: WIDTH as u32, height: HEIGHT as u32, shapes: sheet.shapes }
}

#[derive(Default)]
struct Sheet {
    shapes: Vec<Shape>,
}

impl Sheet {
    fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64, colour: Colour) {
        self.shapes.push(Shape::Line { from, to, width, colour });
    }

    fn text(&mut self, at: (f64, f64), anchor: Anchor, weight: Weight, colour: Colour, text: &str) {
        self.shapes.push(Shape::Text { at, anchor, weight, colour, upright: true, text: text.into() });
    }
}

/// A range of values over a stretch of the picture.
#[derive(Clone, Copy, Debug)]
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// With some room on either side.
    fn around(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let room = match (high - low) * 0.12 {
            room if room > 0.01 * high.abs() => room,
            _ => 0.1 * high.abs().max(0.1),
        };
        Self { low: low - room, high: high + room, from, to }
    }

    fn place(self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Round numbers, about eight.
    fn ticks(self) -> Vec<f64> {
        let wished = (self.high - self.low) / 8.0;
        let power = 10f64.powf(wished.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= wished);
        let step = step.unwrap_or(wished);
        let first = (self.low / step).ceil() as i64;
        (first..first + 20).map(|i| i as f64 * step).take_while(|v| *v <= self.high).collect()
    }

    /// Of an axis of logarithms: values, and whether a number stands beside them.
    fn decades(self) -> Vec<(f64, bool)> {
        let decades = self.high - self.low;
        let numbered: &[u8] = match decades {
            0.0..0.7 => &[1, 2, 3, 4, 5, 6, 7, 8, 9],
            0.7..2.5 => &[1, 2, 5],
            _ => &[1],
        };
        let powers = (self.low.floor() as i32..=self.high.ceil() as i32).take(40);
        let all = powers.flat_map(|p| (1..=9u8).map(move |m| (f64::from(m) * 10f64.powi(p), m)));
        let inside = all.filter(|(v, _)| (self.low..=self.high).contains(&v.log10()));
        let drawn = inside.filter(|(_, m)| decades < 6.0 || *m == 1);
        drawn.map(|(v, m)| (v, numbered.contains(&m))).collect()
    }
}

/// Without digits that say nothing.
fn number(value: f64) -> String {
    let text =
        if value != 0.0 && value.abs() < 1e-4 { format!("{value:.0e}") } else { format!("{value:.4}") };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

fn short(name: &str) -> String {
    match name.chars().count() > LONGEST_NAME {
        true => name.chars().take(LONGEST_NAME - 2).chain("..".chars()).collect(),
        false => name.to_string(),
    }
}

#[derive(Clone, Copy, Debug)]
struct Area {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Area {
    /// How much of it lies under another.
    fn common(self, other: Self) -> f64 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0.0) * height.max(0.0)
    }

    fn around((x, y): (f64, f64), radius: f64) -> Self {
        Self { left: x - radius, right: x + radius, top: y - radius, bottom: y + radius }
    }
}

/// Where the names of points go: as near as is free of names, points and leading lines, tried in
/// rings around each point.
fn label_places(points: &[(f64, f64)], names: &[String]) -> Vec<Area> {
    const DIRECTIONS: usize = 24;
    let mut taken: Vec<Area> = points.iter().map(|&p| Area::around(p, RADIUS + 1.0)).collect();
    let mut placed: Vec<Area> = Vec::new();
    let (advance, line) = LETTER;
    for (&(x, y), name) in points.iter().zip(names) {
        let (width, height) = (name.chars().count() as f64 * advance + 2.0, line + 1.0);
        let mut best: Option<(f64, Area)> = None;
        'rings: for ring in 0..60 {
            let distance = RADIUS + 3.0 + 9.0 * f64::from(ring);
            for k in 0..DIRECTIONS {
                // Right first, then above and below by turns.
                let turn = k.div_ceil(2) as f64 * if k % 2 == 0 { 1.0 } else { -1.0 };
                let (sin, cos) = (turn * std::f64::consts::TAU / DIRECTIONS as f64).sin_cos();
                // The label's nearest point lies at the distance.
                let left = x + cos * distance
                    - if cos < -0.1 {
                        width
                    } else if cos > 0.1 {
                        0.0
                    } else {
                        width / 2.0
                    };
                let top = y + sin * distance - height / 2.0 + sin * height / 2.0;
                let area = Area { left, right: left + width, top, bottom: top + height };
                if left < LEFT + 2.0
                    || area.right > RIGHT - 2.0
                    || top < TOP + 2.0
                    || area.bottom > BOTTOM - 2.0
                {
                    continue;
                }
                let near = (x.clamp(area.left, area.right), y.clamp(area.top, area.bottom));
                let on_the_way = (1..20).map(|i| {
                    let t = f64::from(i) / 20.0;
                    Area::around((x + (near.0 - x) * t, y + (near.1 - y) * t), 0.75)
                });
                let crossed: f64 =
                    on_the_way.flat_map(|a| placed.iter().map(move |b| a.common(*b))).sum::<f64>() / 4.0;
                let cost = crossed + taken.iter().map(|t| area.common(*t)).sum::<f64>();
                if best.is_none_or(|(least, _)| cost < least) {
                    best = Some((cost, area));
                }
                if cost == 0.0 {
                    break 'rings;
                }
            }
        }
        // A name wider than the area has no place in it at all.
        let area =
            best.map_or(Area { left: LEFT, right: LEFT + width, top: y, bottom: y + height }, |(_, a)| a);
        let near = (x.clamp(area.left, area.right), y.clamp(area.top, area.bottom));
        // Names that come later keep off the line to this one.
        taken.extend((1..20).map(|i| {
            let t = f64::from(i) / 20.0;
            Area::around((x + (near.0 - x) * t, y + (near.1 - y) * t), 0.75)
        }));
        taken.push(area);
        placed.push(area);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(i: u64, kld: f64) -> Point {
        let bytes = 4_000_000 + 10_000 * i;
        let bits_per_weight = bytes as f64 / 1e6;
        Point {
            name: format!("a-model-{i}"),
            bytes,
            bits_per_weight,
            kld: Estimate { value: kld, error: kld / 30.0 },
        }
    }

    #[test]
    fn names_do_not_overlap() {
        for n in [1, 2, 7, 20, 40] {
            let points: Vec<_> =
                (0..n).map(|i| (400.0 + 3.0 * f64::from(i), 300.0 - f64::from(i % 5))).collect();
            let names: Vec<_> = (0..n).map(|i| format!("SmolLM2-135M-{i}")).collect();
            let labels = label_places(&points, &names);
            for (i, a) in labels.iter().enumerate() {
                assert!(labels[..i].iter().all(|b| a.common(*b) == 0.0), "{n}: {i}");
                assert!(points.iter().all(|&p| a.common(Area::around(p, RADIUS)) == 0.0), "{n}: {i}");
                assert!(a.left > LEFT && a.right < RIGHT && a.top > TOP && a.bottom < BOTTOM, "{n}: {i}");
            }
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        for (low, high) in [(0.0, 1.0), (3.7, 4.1), (980.0, 31_000.0), (0.0012, 0.0019)] {
            let axis = Axis { low, high, from: 0.0, to: 1.0 };
            let ticks = axis.ticks();
            assert!((4..=9).contains(&ticks.len()), "{low} to {high}: {ticks:?}");
            assert!(ticks.iter().all(|t| (low..=high).contains(t)), "{ticks:?}");
        }
        assert_eq!(["0.001", "5e-5", "20", "0.25"].map(String::from), [1e-3, 5e-5, 20.0, 0.25].map(number));
    }

    #[test]
    fn all_that_departs_is_drawn() {
        let points: Vec<Point> = [1e-4, 1e-2, 0.0, 1.5].iter().zip(1..).map(|(k, i)| point(i, *k)).collect();
        let picture = kld_over_size(&point(0, 0.0), &points);
        let dots = picture.shapes.iter().filter(|s| matches!(s, Shape::Dot { .. })).count();
        let svg = picture.to_svg();
        assert!(dots == 3 && svg.contains("divergence above 0: a-model-3<"), "{svg}");
        for text in
            ["from a-model-0 (4.00 MB", "bits per weight", "size of the tensors, MB", ">0.01<", "nats"]
        {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        // Nothing to draw is no reason to fail.
        assert!(kld_over_size(&point(0, 0.0), &[]).to_svg().ends_with("</svg>\n"));
        assert!(!kld_over_size(&point(0, 0.0), &[point(1, f64::NAN)]).to_png().is_empty());
    }
}
