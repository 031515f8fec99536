//! Latencies in logarithmic buckets: 64 to each power of two, so a quantile is off by less than 1.6 %.

const STEPS: usize = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();

/// Counts nanoseconds. Adding costs an increment; nothing is allocated after `new`.
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    pub fn new() -> Self {
        Histogram { buckets: vec![0; STEPS * (64 - STEP_BITS as usize + 1)], count: 0 }
    }

    pub fn add(&mut self, nanos: u64) {
        self.count += 1;
        let at = bucket(nanos);
        if let Some(bucket) = self.buckets.get_mut(at) {
            *bucket += 1;
        }
    }

    /// The value in microseconds below which `part` of all values lie; none if nothing was added.
    pub fn quantile_us(&self, part: f64) -> Option<f64> {
        if self.count == 0 {
            return None;
        }
        let wanted = (self.count as f64 * part).ceil() as u64;
        let mut seen = 0;
        let at = self.buckets.iter().position(|bucket| {
            seen += bucket;
            seen >= wanted
        })?;
        Some(upper_bound(at) as f64 / 1_000.0)
    }

    pub fn clear(&mut self) {
        self.buckets.fill(0);
        self.count = 0;
    }
}

/// Values below `STEPS` have a bucket each; above, the bits after the leading one choose.
fn bucket(nanos: u64) -> usize {
    if nanos < STEPS as u64 {
        return nanos as usize;
    }
    let magnitude = 63 - nanos.leading_zeros() - STEP_BITS;
    STEPS * (magnitude as usize + 1) + ((nanos >> magnitude) as usize - STEPS)
}

fn upper_bound(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let magnitude = bucket / STEPS - 1;
    (((bucket % STEPS + STEPS) as u64) << magnitude) + ((1 << magnitude) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_that_ends_close_above_it() {
        for value in (0..10_000).chain([1 << 20, (1 << 33) + 12_345, u64::MAX / 2]) {
            let end = upper_bound(bucket(value));
            assert!(end >= value && end - value <= value / 64 + 1, "{value} ends at {end}");
        }
    }

    #[test]
    fn a_quantile_is_the_value_below_which_that_part_lies() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile_us(0.99), None);
        (1..=100).for_each(|ms| histogram.add(ms * 1_000_000));
        let p99 = histogram.quantile_us(0.99).unwrap();
        assert!((99_000.0..100_800.0).contains(&p99), "{p99}");
    }
}
