//! A bounded table with handles that go stale: a handle names its row and the row's generation, so that an answer to something long gone hits nothing.

/// Names one row of a [`Slots`] for as long as it is occupied by the same thing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Slot {
    index: u32,
    generation: u32,
}

impl Slot {
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub fn from_bits(bits: u64) -> Self {
        Slot { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

#[derive(Debug)]
pub(crate) struct Slots<T> {
    rows: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    rows_max: usize,
}

impl<T> Slots<T> {
    pub fn new(rows_max: usize) -> Self {
        Slots { rows: Vec::new(), free: Vec::new(), rows_max: rows_max.min(u32::MAX as usize) }
    }

    /// `None` when the table is full.
    pub fn insert(&mut self, value: T) -> Option<Slot> {
        if let Some(index) = self.free.pop() {
            let (generation, row) = self.rows.get_mut(index as usize)?;
            *row = Some(value);
            return Some(Slot { index, generation: *generation });
        }
        if self.rows.len() >= self.rows_max {
            return None;
        }
        let index = self.rows.len() as u32;
        self.rows.push((0, Some(value)));
        Some(Slot { index, generation: 0 })
    }

    pub fn get(&self, slot: Slot) -> Option<&T> {
        self.rows.get(slot.index as usize).filter(|(g, _)| *g == slot.generation).and_then(|(_, row)| row.as_ref())
    }

    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut T> {
        self.rows.get_mut(slot.index as usize).filter(|(g, _)| *g == slot.generation).and_then(|(_, row)| row.as_mut())
    }

    pub fn remove(&mut self, slot: Slot) -> Option<T> {
        let (generation, row) = self.rows.get_mut(slot.index as usize).filter(|(g, _)| *g == slot.generation)?;
        let value = row.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(slot.index);
        Some(value)
    }

    pub fn len(&self) -> usize {
        self.rows.len() - self.free.len()
    }

    pub fn is_full(&self) -> bool {
        self.len() >= self.rows_max
    }

    pub fn iter(&self) -> impl Iterator<Item = (Slot, &T)> {
        self.rows.iter().enumerate().filter_map(|(index, (generation, row))| {
            Some((Slot { index: index as u32, generation: *generation }, row.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_of_a_removed_row_hits_nothing() {
        let mut slots = Slots::new(2);
        let a = slots.insert('a').unwrap();
        let b = slots.insert('b').unwrap();
        assert_eq!(slots.insert('c'), None);
        assert!(slots.is_full());
        assert_eq!(slots.remove(a), Some('a'));
        assert_eq!((slots.remove(a), slots.get(a)), (None, None));
        let c = slots.insert('c').unwrap();
        assert_eq!((slots.get(c), slots.get(a), slots.get(b)), (Some(&'c'), None, Some(&'b')));
        assert_eq!(Slot::from_bits(c.to_bits()), c);
        assert_eq!(slots.len(), 2);
    }
}
