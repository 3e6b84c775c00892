//! The multiple-choice knapsack: of each item one offer, so that all together weigh no more than a limit
//! and lose least.
//!
//! Items' convex hulls give the optimum of the relaxed problem, and with it a price of a byte and a first
//! solution (greedy by slope). At that price an offer's reduced cost is what it adds to the relaxed
//! optimum at least; combinations whose reduced costs exceed the first solution's gap cannot be better
//! than it. Those that are left are gone through item by item, of states with as many bytes and no less
//! loss only one (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11). Deterministic.

/// What an item weighs and loses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer {
    /// Bytes.
    pub bytes: u64,
    /// A finite number, not negative.
    pub loss: f64,
}

/// States kept of each item. Where more are needed the result may be no optimum, but is no worse than the
/// greedy one, which lies within one step of it.
const MOST_STATES: usize = 1 << 10;

/// A step up an item's hull.
struct Step {
    item: usize,
    to: usize,
    bytes: u64,
    /// Loss saved by a byte.
    price: f64,
}

/// For each item the number of the offer that is taken; `None` where even the smallest weigh more than
/// `limit`, or an item has no offers.
pub fn choose(items: &[Vec<Offer>], limit: u64) -> Option<Vec<usize>> {
    let mut steps = Vec::new();
    let mut greedy = Vec::with_capacity(items.len());
    let mut bytes = 0u64;
    for (item, offers) in items.iter().enumerate() {
        let hull = hull(offers);
        let first = *hull.first()?;
        bytes = bytes.checked_add(offers[first].bytes)?;
        greedy.push(first);
        steps.extend(hull.windows(2).map(|pair| {
            let (a, b) = (offers[pair[0]], offers[pair[1]]);
            let more = b.bytes - a.bytes;
            Step { item, to: pair[1], bytes: more, price: (a.loss - b.loss) / more as f64 }
        }));
    }
    if bytes > limit {
        return None;
    }
    // Stable: steps of one item stay in order, since their prices fall.
    steps.sort_by(|a, b| b.price.total_cmp(&a.price));
    let mut price = None;
    let mut closed = vec![false; items.len()];
    for step in &steps {
        if closed[step.item] {
            continue;
        }
        if bytes + step.bytes <= limit {
            bytes += step.bytes;
            greedy[step.item] = step.to;
        } else {
            closed[step.item] = true;
            price.get_or_insert(step.price);
        }
    }
    match price {
        Some(price) => Some(improve(items, limit, price, &greedy).unwrap_or(greedy)),
        None => Some(greedy),
    }
}

/// Sum of bytes and losses of a choice.
pub fn total(items: &[Vec<Offer>], choice: &[usize]) -> Offer {
    let taken = items.iter().zip(choice).map(|(offers, &k)| offers[k]);
    taken
        .fold(Offer { bytes: 0, loss: 0.0 }, |a, b| Offer { bytes: a.bytes + b.bytes, loss: a.loss + b.loss })
}

/// Offers on the lower convex hull, from the smallest to the one that loses least.
fn hull(offers: &[Offer]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..offers.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (offers[a], offers[b]);
        x.bytes.cmp(&y.bytes).then(x.loss.total_cmp(&y.loss)).then(a.cmp(&b))
    });
    let mut hull: Vec<usize> = Vec::new();
    for k in order {
        let new = offers[k];
        if hull.last().is_some_and(|&last| new.loss >= offers[last].loss) {
            continue; // larger, and no better
        }
        let price = |a: Offer| (a.loss - new.loss) / (new.bytes - a.bytes) as f64;
        while let [.., a, b] = hull[..]
            && price(offers[b]) >= price(offers[a])
        {
            hull.pop();
        }
        hull.push(k);
    }
    hull
}

/// A combination of offers for the items so far.
#[derive(Clone, Copy)]
struct State {
    bytes: u64,
    loss: f64,
    reduced: f64,
    /// The state of the items before, and the offer of this one.
    from: (u32, u32),
}

/// A better choice than `greedy`, if there is one.
fn improve(items: &[Vec<Offer>], limit: u64, price: f64, greedy: &[usize]) -> Option<Vec<usize>> {
    let cost = |o: &Offer| o.loss + price * o.bytes as f64;
    let least: Vec<f64> =
        items.iter().map(|offers| offers.iter().map(cost).fold(f64::INFINITY, f64::min)).collect();
    let known = total(items, greedy).loss;
    let bound = least.iter().sum::<f64>() - price * limit as f64;
    // A little more, for the rounding of the sums.
    let gap = (known - bound) + 1e-12 * (known.abs() + bound.abs() + price * limit as f64);
    let mut rest: u64 = items.iter().map(|o| o.iter().map(|o| o.bytes).min().unwrap_or(0)).sum();
    let mut stages: Vec<Vec<State>> = Vec::with_capacity(items.len());
    let mut states = vec![State { bytes: 0, loss: 0.0, reduced: 0.0, from: (0, 0) }];
    for (offers, least) in items.iter().zip(&least) {
        rest -= offers.iter().map(|o| o.bytes).min().unwrap_or(0);
        let mut next = Vec::new();
        for (k, offer) in offers.iter().enumerate() {
            let reduced = cost(offer) - least;
            for (at, s) in states.iter().enumerate() {
                let bytes = s.bytes + offer.bytes;
                if s.reduced + reduced <= gap && bytes + rest <= limit {
                    let (loss, reduced) = (s.loss + offer.loss, s.reduced + reduced);
                    next.push(State { bytes, loss, reduced, from: (at as u32, k as u32) });
                }
            }
        }
        next.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)).then(a.from.cmp(&b.from)));
        let mut lowest = f64::INFINITY;
        next.retain(|s| {
            let is_lower = s.loss < lowest;
            lowest = lowest.min(s.loss);
            is_lower
        });
        if next.len() > MOST_STATES {
            next.sort_by(|a, b| a.reduced.total_cmp(&b.reduced).then(a.from.cmp(&b.from)));
            next.truncate(MOST_STATES);
        }
        stages.push(states);
        states = next;
    }
    let best = states.iter().min_by(|a, b| a.loss.total_cmp(&b.loss).then(a.bytes.cmp(&b.bytes)))?;
    if best.loss >= known {
        return None;
    }
    let mut choice = vec![0; items.len()];
    let mut from = best.from;
    for (taken, stage) in choice.iter_mut().zip(&stages).rev() {
        *taken = from.1 as usize;
        from = stage[from.0 as usize].from;
    }
    Some(choice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The least loss there is, by trying everything.
    fn brute_force(items: &[Vec<Offer>], limit: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let each = first.iter().filter(|o| o.bytes <= limit);
        let losses = each.filter_map(|o| Some(o.loss + brute_force(rest, limit - o.bytes)?));
        losses.min_by(f64::total_cmp)
    }

    fn offers() -> impl Strategy<Value = Vec<Offer>> {
        let offer =
            (0u64..40, 0u32..60).prop_map(|(bytes, loss)| Offer { bytes, loss: f64::from(loss) / 7.0 });
        proptest::collection::vec(offer, 1..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn nothing_is_better(items in proptest::collection::vec(offers(), 1..7), limit in 0u64..200) {
            let choice = choose(&items, limit);
            match brute_force(&items, limit) {
                None => prop_assert_eq!(choice, None),
                Some(loss) => {
                    let found = total(&items, &choice.unwrap());
                    prop_assert!(found.bytes <= limit);
                    prop_assert!((found.loss - loss).abs() < 1e-9, "{} instead of {}", found.loss, loss);
                }
            }
        }
    }

    #[test]
    fn a_large_model_is_chosen_for() {
        // As many tensors as a model of 80 layers has, each in seven types.
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1 << 24) as f64
        };
        let mut item = || {
            let (size, sensitivity) = (1000 + (random() * 5000.0) as u64, random());
            let offer =
                |bits: u64| Offer { bytes: size * bits * 32, loss: sensitivity * 0.25f64.powi(bits as i32) };
            (2..9).map(offer).collect::<Vec<_>>()
        };
        let items: Vec<_> = (0..560).map(|_| item()).collect();
        let all = |bits: usize| total(&items, &vec![bits - 2; items.len()]);
        let limit = all(4).bytes;
        let choice = choose(&items, limit).unwrap();
        let found = total(&items, &choice);
        assert!(found.bytes <= limit && found.loss < all(4).loss);
    }

    #[test]
    fn what_does_not_fit() {
        let item = vec![Offer { bytes: 5, loss: 1.0 }];
        assert_eq!(choose(&[item.clone(), item.clone()], 9), None);
        assert_eq!(choose(&[item.clone(), item], 10), Some(vec![0, 0]));
        assert_eq!(choose(&[Vec::new()], 10), None);
        assert_eq!(choose(&[], 0), Some(Vec::new()));
    }
}
