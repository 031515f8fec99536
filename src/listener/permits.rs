//! How many connections are open, in total and per address, over all workers.
//!
//! One counter and one table behind a short lock, touched twice in a connection's life and never per message. The table holds one entry per
//! address that has a connection open, so `connections_max` bounds it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use portable_atomic::{AtomicUsize, Ordering};

use crate::gateway::AddressKey;
use crate::telemetry;

/// The shared table.
#[derive(Debug, Default)]
pub struct Permits {
    open: AtomicUsize,
    by_address: Mutex<HashMap<AddressKey, u32>>,
}

/// The right to one open connection; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    permits: Arc<Permits>,
    address: Option<AddressKey>,
}

impl Permits {
    /// One of `connections_max` connections, or `None` when all are open.
    pub fn acquire(self: &Arc<Self>, connections_max: u32) -> Option<Permit> {
        let limit = usize::try_from(connections_max).unwrap_or(usize::MAX);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| (open < limit).then_some(open + 1)).ok()?;
        telemetry::meters().connections_open.increment(1.0);
        Some(Permit { permits: self.clone(), address: None })
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

impl Permit {
    /// Counts the connection for `address` too (IPv6: its /64); `false` when that has `per_address_max` open already.
    pub fn count_for(&mut self, address: IpAddr, per_address_max: u32) -> bool {
        let key = AddressKey::from(address);
        if self.address == Some(key) {
            return true;
        }
        self.forget_address();
        let mut table = self.permits.by_address.lock();
        let open = table.entry(key).or_insert(0);
        if *open >= per_address_max {
            return false;
        }
        *open += 1;
        self.address = Some(key);
        true
    }

    fn forget_address(&mut self) {
        let Some(key) = self.address.take() else { return };
        let mut table = self.permits.by_address.lock();
        if let Some(open) = table.get_mut(&key) {
            *open -= 1;
            if *open == 0 {
                table.remove(&key);
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.forget_address();
        self.permits.open.fetch_sub(1, Ordering::Relaxed);
        telemetry::meters().connections_open.decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_total_is_a_bound_and_comes_back() {
        let permits = Arc::new(Permits::default());
        let first = permits.acquire(2).unwrap();
        let _second = permits.acquire(2).unwrap();
        assert!(permits.acquire(2).is_none());
        drop(first);
        assert!(permits.acquire(2).is_some());
    }

    #[test]
    fn each_address_has_its_own_bound_and_leaves_nothing_behind() {
        let permits = Arc::new(Permits::default());
        let mut held = Vec::new();
        for _ in 0..3 {
            let mut permit = permits.acquire(100).unwrap();
            assert!(permit.count_for(address("192.0.2.1"), 3));
            assert!(permit.count_for(address("192.0.2.1"), 3), "counted once");
            held.push(permit);
        }
        let mut fourth = permits.acquire(100).unwrap();
        assert!(!fourth.count_for(address("192.0.2.1"), 3));
        assert!(fourth.count_for(address("192.0.2.2"), 3));
        assert!(!permits.acquire(100).unwrap().count_for(address("::ffff:192.0.2.1"), 3));
        held.pop();
        assert!(permits.acquire(100).unwrap().count_for(address("192.0.2.1"), 3));
        drop((held, fourth));
        assert_eq!(permits.open(), 0);
        assert!(permits.by_address.lock().is_empty());
    }

    #[test]
    fn a_refused_address_leaves_no_entry() {
        let permits = Arc::new(Permits::default());
        let mut permit = permits.acquire(1).unwrap();
        assert!(permit.count_for(address("2001:db8::1"), 1));
        // Behind a proxy the address changes when its header is read.
        assert!(permit.count_for(address("2001:db8:1::1"), 1));
        assert_eq!(permits.by_address.lock().len(), 1);
    }
}
