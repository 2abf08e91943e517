//! What is learned of reuse: how likely a segment of a kind is to be used again at each age, and what that is worth.
//!
//! *Survival statistics.* Segments are told apart by how often they were used and by the usual gap between their uses. For each
//! class and age (half octaves of requests) there are counts of blocks that reached the age and of blocks used again in it: a
//! discrete hazard. Both decay, so old habits fade. Sparse classes lean on the product of their margins (uses, gap), these on the
//! whole, and the whole on a hazard that falls with age: with no data the order is that of recency.
//!
//! *Value.* Of a segment at some age: the highest rate of hits per unit of time that keeping it can earn, over all ages at which one
//! may stop (the Gittins index: Gittins 1979, for the hazard as above; computed for all ages at once by merging from
//! the oldest, as in Aalto, Ayesta, Righter 2009). "Least hit density" (Beckmann and others, NSDI 2018) is the same for one fixed
//! horizon.

/// Classes by number of uses: 1, 2, 3, 4, up to 8, 16, 64, and more.
const USES: usize = 8;
/// Classes by usual gap between uses, in octaves of requests.
pub(super) const GAPS: usize = 28;
/// Both together.
const CLASSES: usize = USES * GAPS;
/// Rows of the tables: classes, the whole, and the two margins.
const ROOT: usize = CLASSES;
const BY_USES: usize = ROOT + 1;
const BY_GAP: usize = BY_USES + USES;
const ROWS: usize = BY_GAP + GAPS;
/// Half octaves of age.
pub(super) const AGES: usize = 52;
/// Values of the two marks of a segment that scale its hazard.
const MARKS: [usize; 2] = [32, 2];

/// A prior counts as much as so many segments; a prior for a whole row as much as so many.
const PRIOR_SEGMENTS: f64 = 8.0;
const ROW_PRIOR_SEGMENTS: f64 = 2.0;
/// With no data: the chance of reuse in the first octave of age, and how it falls from one octave to the next.
const FIRST_OCTAVE: f64 = 0.3;
const OCTAVE_DECAY: f64 = 0.7;
/// Neighbouring ages, and gaps, share half of what they know.
const SMOOTHING: f64 = 0.5;
/// After so many segments all counts are halved.
const MEMORY_SEGMENTS: f64 = 20_000.0;
/// No prior is surer than this.
const SUREST: f64 = 0.95;

type Row = [f32; AGES];

/// Half octave of an age.
pub(super) fn age_class(age: u32) -> usize {
    let age = u64::from(age.max(1));
    let octave = age.ilog2();
    let upper = age * age >= 2 << (2 * octave);
    (2 * octave as usize + usize::from(upper)).min(AGES - 1)
}

/// First age of a class.
pub(super) fn age_floor(class: usize) -> f64 {
    if class == 0 { 0.0 } else { (class as f64 / 2.0).exp2() }
}

/// The class of segments with so many uses, at such gaps.
pub(super) fn class_of(uses: u16, gap_class: usize) -> u8 {
    let uses = match uses {
        0..=4 => usize::from(uses.max(1)) - 1,
        5..=8 => 4,
        9..=16 => 5,
        17..=64 => 6,
        _ => 7,
    };
    (uses * GAPS + gap_class) as u8
}

/// A segment as statistics see it.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) class: u8,
    /// See [`MARKS`]: share of its request that was known, and whether it ended its request.
    pub(super) marks: [u8; 2],
}

/// Counts and what follows from them. About 210 KiB, whatever the number of blocks.
pub(super) struct Learned {
    used_again: Vec<Row>,
    reached: Vec<Row>,
    chance: Vec<Row>,
    value: Vec<Row>,
    mark_used: [[f64; 32]; 2],
    mark_expected: [[f64; 32]; 2],
    mark_factor: [[f64; 32]; 2],
    /// Weights of segments, and their squares: what one segment counts on average.
    weights: f64,
    squares: f64,
    segments: f64,
}

impl Learned {
    pub(super) fn new() -> Self {
        let rows = |count| vec![[0.0; AGES]; count];
        let mut learned = Self {
            used_again: rows(ROWS),
            reached: rows(ROWS),
            chance: rows(ROWS),
            value: rows(CLASSES),
            mark_used: [[0.0; 32]; 2],
            mark_expected: [[0.0; 32]; 2],
            mark_factor: [[1.0; 32]; 2],
            weights: 0.0,
            squares: 0.0,
            segments: 0.0,
        };
        learned.recompute();
        learned
    }

    fn factor(&self, kind: Kind) -> f64 {
        self.mark_factor[0][usize::from(kind.marks[0])] * self.mark_factor[1][usize::from(kind.marks[1])]
    }

    /// Worth of keeping a segment of this age.
    pub(super) fn value(&self, kind: Kind, age: u32) -> f64 {
        f64::from(self.value[usize::from(kind.class)][age_class(age)]) * self.factor(kind)
    }

    /// A segment of this weight came to be.
    pub(super) fn count_segment(&mut self, weight: f64) {
        self.weights += weight;
        self.squares += weight * weight;
        self.segments += 1.0;
    }

    /// Blocks of this weight were used again at this age.
    pub(super) fn count_use(&mut self, kind: Kind, age: u32, weight: f64) {
        add(&mut self.used_again, kind.class, age_class(age), weight);
        for (used, mark) in self.mark_used.iter_mut().zip(kind.marks) {
            used[usize::from(mark)] += weight;
        }
    }

    /// Blocks of this weight reached an age without being used.
    pub(super) fn count_reached(&mut self, kind: Kind, age_class: usize, weight: f64) {
        add(&mut self.reached, kind.class, age_class, weight);
        let chance = f64::from(self.chance[usize::from(kind.class)][age_class]);
        let expected = weight * (chance * self.factor(kind)).min(1.0);
        for (i, mark) in kind.marks.into_iter().enumerate() {
            let mark = usize::from(mark);
            self.mark_expected[i][mark] += expected / self.mark_factor[i][mark];
        }
    }

    /// Draws the consequences of all counts, and lets old ones fade.
    pub(super) fn recompute(&mut self) {
        let prior = PRIOR_SEGMENTS * self.one_segment();
        for (i, marks) in MARKS.into_iter().enumerate() {
            for mark in 0..marks {
                let (used, expected) = (self.mark_used[i][mark], self.mark_expected[i][mark]);
                self.mark_factor[i][mark] = (used + prior) / (expected + prior);
            }
        }
        // The whole first, then the margins, then the classes: each leans on those before it.
        for row in std::iter::once(ROOT).chain(BY_USES..ROWS).chain(0..CLASSES) {
            self.estimate(row);
        }
        for class in 0..CLASSES {
            self.value[class] = best_rates(&self.chance[class]);
        }
        if self.segments > MEMORY_SEGMENTS {
            self.fade();
        }
    }

    fn fade(&mut self) {
        self.segments /= 2.0;
        self.weights /= 2.0;
        self.squares /= 2.0;
        let counts = self.used_again.iter_mut().chain(&mut self.reached).flatten();
        counts.for_each(|count| *count /= 2.0);
        let marks = self.mark_used.iter_mut().chain(&mut self.mark_expected).flatten();
        marks.for_each(|count| *count /= 2.0);
    }

    /// What one segment weighs where counts are dense.
    fn one_segment(&self) -> f64 {
        if self.weights > 0.0 { self.squares / self.weights } else { 1.0 }
    }

    /// What a row should look like, judged by others; the scale is left to the row itself.
    fn prior(&self, row: usize, age: usize) -> f64 {
        let whole = f64::from(self.chance[ROOT][age]);
        if row >= BY_USES {
            return whole;
        }
        let by_uses = f64::from(self.chance[BY_USES + row / GAPS][age]);
        if row < GAPS {
            // Never used again: the gap is not its own.
            return by_uses;
        }
        let by_gap = f64::from(self.chance[BY_GAP + row % GAPS][age]);
        (by_uses * by_gap / whole.max(1e-9)).min(SUREST)
    }

    fn estimate(&mut self, row: usize) {
        let (used, reached) = self.smoothed(row);
        let one = self.one_segment();
        if row == ROOT {
            let weight = ROW_PRIOR_SEGMENTS * one;
            let step = OCTAVE_DECAY.sqrt();
            let mut before = 0.0;
            for age in 0..AGES {
                let prior = if age == 0 { 1.0 - (1.0 - FIRST_OCTAVE).sqrt() } else { before * step };
                before = (used[age] + weight * prior) / (reached[age] + weight);
                self.chance[row][age] = before as f32;
            }
            return;
        }
        let expected: f64 = (0..AGES).map(|age| reached[age] * self.prior(row, age)).sum();
        let row_weight = ROW_PRIOR_SEGMENTS * one;
        let typical = if (BY_USES..BY_GAP).contains(&row) { of_succession(row - BY_USES) } else { 1.0 };
        let scale = (used.iter().sum::<f64>() + row_weight * typical) / (expected + row_weight);
        let weight = PRIOR_SEGMENTS * one;
        for age in 0..AGES {
            let prior = (self.prior(row, age) * scale).min(SUREST);
            self.chance[row][age] = ((used[age] + weight * prior) / (reached[age] + weight)) as f32;
        }
    }

    /// Counts of a row, with what neighbouring ages and gaps add.
    fn smoothed(&self, row: usize) -> ([f64; AGES], [f64; AGES]) {
        let over_ages = |rows: &[Row], row: usize, age: usize| {
            let [before, after] = [age.saturating_sub(1), (age + 1).min(AGES - 1)];
            let sides = f64::from(rows[row][before]) + f64::from(rows[row][after]);
            (f64::from(rows[row][age]) + SMOOTHING * sides) / (1.0 + 2.0 * SMOOTHING)
        };
        let gap = match row {
            GAPS..CLASSES => Some(row % GAPS),
            BY_GAP.. => Some(row - BY_GAP),
            _ => None,
        };
        let left = gap.filter(|gap| *gap > 0).map(|_| row - 1);
        let right = gap.filter(|gap| *gap < GAPS - 1).map(|_| row + 1);
        let (mut used, mut reached) = ([0.0; AGES], [0.0; AGES]);
        for age in 0..AGES {
            let both = |rows: &[Row]| {
                let sides = left.iter().chain(&right).map(|row| over_ages(rows, *row, age)).sum::<f64>();
                over_ages(rows, row, age) + SMOOTHING * sides
            };
            used[age] = both(&self.used_again);
            reached[age] = both(&self.reached).max(used[age]);
        }
        (used, reached)
    }
}

fn add(rows: &mut [Row], class: u8, age: usize, weight: f64) {
    let class = usize::from(class);
    let by_gap = (class >= GAPS).then_some(BY_GAP + class % GAPS);
    for row in [class, ROOT, BY_USES + class / GAPS].into_iter().chain(by_gap) {
        rows[row][age] += weight as f32;
    }
}

/// Laplace's rule of succession, against that of one use: after u uses without end, another has the odds u to 1.
fn of_succession(uses_class: usize) -> f64 {
    const USES_OF_CLASS: [f64; USES] = [1.0, 2.0, 3.0, 4.0, 6.5, 12.0, 32.0, 96.0];
    2.0 * USES_OF_CLASS[uses_class] / (USES_OF_CLASS[uses_class] + 1.0)
}

/// The best rate of reuse per request that can be had from each age on, for a hazard by age. From the oldest age down:
/// an age joins the stretch after it as long as that earns more.
fn best_rates(chance: &Row) -> Row {
    struct Stretch {
        hits: f64,
        time: f64,
        survivors: f64,
    }
    let mut rates = [0.0; AGES];
    let mut stretches: Vec<Stretch> = Vec::with_capacity(AGES);
    for age in (0..AGES).rev() {
        let chance = f64::from(chance[age]);
        let width = age_floor(age + 1) - age_floor(age);
        let mut joined =
            Stretch { hits: chance, time: width * (1.0 - chance / 2.0), survivors: 1.0 - chance };
        while let Some(next) =
            stretches.last().filter(|next| next.hits * joined.time > joined.hits * next.time)
        {
            joined.hits += joined.survivors * next.hits;
            joined.time += joined.survivors * next.time;
            joined.survivors *= next.survivors;
            stretches.pop();
        }
        rates[age] = (joined.hits / joined.time) as f32;
        stretches.push(joined);
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_fall_into_half_octaves() {
        // No whole number is in the second half of the first octave.
        for class in 3..AGES {
            let first = age_floor(class).ceil() as u32;
            assert_eq!(age_class(first), class, "{first}");
            assert_eq!(age_class(first - 1), class - 1, "{first}");
        }
        assert_eq!((age_class(0), age_class(1)), (0, 0));
    }

    #[test]
    fn with_no_data_the_younger_is_worth_more() {
        let learned = Learned::new();
        let kind = Kind { class: class_of(1, 0), marks: [0, 0] };
        let values: Vec<f64> = (0..20).map(|octave| learned.value(kind, 1 << octave)).collect();
        assert!(values.windows(2).all(|pair| pair[0] > pair[1]), "{values:?}");
    }

    #[test]
    fn a_sure_return_after_a_while_is_worth_waiting_for() {
        let mut chance = [0.001; AGES];
        chance[20] = 0.9;
        let rates = best_rates(&chance);
        assert!(rates[19] > 100.0 * rates[21]);
        assert!(rates[18] < rates[19] && rates[10] < rates[18], "the longer the wait, the less it is worth");
        assert!(rates[10] > rates[21]);
    }
}
