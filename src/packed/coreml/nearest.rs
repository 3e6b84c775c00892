//! What rounding to a constant's own codes would have made of other values: the measure of whether codes are right.

use std::sync::Arc;

use super::weight::{Groups, Weight, round};
use crate::container::coreml::{Constant, DataType, Form};
use crate::error::Result;

impl Weight {
    /// Replaces each of `values`, which stand from element `start` on, by the nearest that the constant could hold
    /// there: with other codes, and the scales, zero points and tables that it has. `false`: that is not told of
    /// entries of several elements, and of what is decoded in more than one step.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn nearest(&self, start: u64, values: &mut [f32]) -> Result<bool> {
        let constant = Arc::clone(self.constant());
        if values.is_empty() {
            return Ok(true);
        }
        match &constant.form {
            Form::Plain(_) => {
                round(constant.data_type, values);
                Ok(true)
            }
            Form::Blockwise { data, scale, offset } if is_stored(data) => {
                self.of_grid(&constant.shape, data, (scale, offset.as_deref()), start, values)?;
                Ok(true)
            }
            Form::Lut { lut, vector_axis: None, .. } => {
                self.of_tables(&constant.shape, lut, false, start, values)?;
                Ok(true)
            }
            Form::Sparse { mask, values: nonzero } => match &nonzero.form {
                Form::SparseLut { lut, .. } => {
                    self.of_tables(&mask.shape, lut, true, start, values)?;
                    Ok(true)
                }
                _ => Ok(false),
            },
            _ => Ok(false),
        }
    }

    /// `scale * (code - offset)` for every code.
    fn of_grid(
        &self,
        shape: &[u64],
        data: &Constant,
        (scale, offset): (&Constant, Option<&Constant>),
        start: u64,
        values: &mut [f32],
    ) -> Result<()> {
        let groups = Groups::new(shape, &scale.shape);
        let span = groups.span(start, values.len());
        let n = (span.end - span.start) as usize;
        let (mut scales, mut offsets) = (vec![0.0; n], vec![0.0; n]);
        self.values(scale, span.start, &mut scales)?;
        if let Some(offset) = offset {
            self.values(offset, span.start, &mut offsets)?;
        }
        // Codes of 8 bits around zero are mostly those of both signs alike.
        let (least, most) = match data.data_type {
            DataType::Int4 => (-8.0, 7.0),
            DataType::Int8 => (-127.0, 127.0),
            other => (0.0, f32::from((1u16 << other.bits()) - 1)),
        };
        groups.runs(start, values.len(), |run, group| {
            let at = (group - span.start) as usize;
            let (scale, offset) = (scales[at], offsets[at]);
            for x in &mut values[run] {
                let code = (*x / scale + offset).round_ties_even().clamp(least, most);
                *x = if code.is_finite() { scale * (code - offset) } else { 0.0 };
            }
        });
        round(scale.data_type, values);
        Ok(())
    }

    /// Entries of tables; of what is sparse zero too.
    fn of_tables(
        &self,
        shape: &[u64],
        lut: &Constant,
        has_zero: bool,
        start: u64,
        values: &mut [f32],
    ) -> Result<()> {
        let [groups @ .., entries, _] = &lut.shape[..] else { return Ok(()) };
        let (groups, entries) = (Groups::new(shape, groups), *entries as usize);
        let span = groups.span(start, values.len());
        let mut tables = vec![0.0; (span.end - span.start) as usize * entries];
        self.values(lut, span.start * entries as u64, &mut tables)?;
        let mut sorted = Vec::with_capacity(entries + 1);
        let mut of = None;
        groups.runs(start, values.len(), |run, group| {
            if of != Some(group) {
                sorted.clear();
                sorted.extend_from_slice(&tables[(group - span.start) as usize * entries..][..entries]);
                sorted.extend(has_zero.then_some(0.0));
                sorted.sort_by(f32::total_cmp);
                of = Some(group);
            }
            for x in &mut values[run] {
                let above = sorted.partition_point(|entry| entry < x);
                let neighbours = [above.checked_sub(1), Some(above)];
                let near = neighbours.into_iter().flatten().filter_map(|i| sorted.get(i));
                let best = near.min_by(|a, b| (*a - *x).abs().total_cmp(&(*b - *x).abs()));
                *x = best.copied().unwrap_or(0.0);
            }
        });
        Ok(())
    }
}

fn is_stored(data: &Constant) -> bool {
    matches!(data.form, Form::Plain(_)) && data.data_type.bits() <= 8
}
