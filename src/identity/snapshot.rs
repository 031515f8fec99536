//! The registry in memory: plain maps behind one pointer. A change copies the maps (a few milliseconds at 100,000 devices, on the watching
//! thread) and shares the devices; readers keep what they hold.
//!
//! About 500 bytes a device; roles are shared.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tidegate_auth::{KeyId, PublicKey};

use super::clock::Now;
use crate::message::{Device, DeviceId};

/// All devices at one moment.
#[derive(Clone, Default)]
pub(super) struct Snapshot {
    by_id: HashMap<DeviceId, Arc<Entry>>,
    by_index: HashMap<u32, Arc<Entry>>,
    by_key: HashMap<PublicKey, u32>,
    roles: Roles,
    /// The registry's revision that this shows.
    pub(super) revision: u64,
    /// Grows by one with every change that was taken over.
    pub(super) version: u64,
}

/// One device and what it proves itself with.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) device: Arc<Device>,
    pub(super) enabled: bool,
    pub(super) keys: Box<[Key]>,
}

/// One of a device's keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) public: PublicKey,
    pub(super) id: KeyId,
    /// Unix seconds, inclusive.
    pub(super) not_before: Option<u64>,
    /// Unix seconds, exclusive.
    pub(super) not_after: Option<u64>,
}

impl Key {
    pub(super) fn is_valid(&self, now: Now) -> bool {
        self.not_before.is_none_or(|from| now.unix_secs >= from)
            && self.not_after.is_none_or(|until| now.unix_secs < until)
    }
}

/// One text for each role that occurs, however many devices have it.
#[derive(Clone, Default)]
struct Roles(HashSet<Arc<str>>);

impl Roles {
    fn share(&mut self, role: &str) -> Arc<str> {
        if let Some(known) = self.0.get(role) {
            return Arc::clone(known);
        }
        let role: Arc<str> = role.into();
        self.0.insert(Arc::clone(&role));
        role
    }
}

impl Snapshot {
    pub(super) fn by_id(&self, id: &DeviceId) -> Option<&Arc<Entry>> {
        self.by_id.get(id)
    }

    pub(super) fn by_index(&self, index: u32) -> Option<&Arc<Entry>> {
        self.by_index.get(&index)
    }

    pub(super) fn by_public_key(&self, key: &PublicKey) -> Option<&Arc<Entry>> {
        self.by_index(*self.by_key.get(key)?)
    }

    pub(super) fn is_current(&self, device: &Device) -> bool {
        self.by_index(device.index).is_some_and(|entry| {
            entry.enabled && entry.device.generation == device.generation && entry.device.id == device.id
        })
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The shared text of a role, for building an [`Entry`].
    pub(super) fn role(&mut self, role: &str) -> Arc<str> {
        self.roles.share(role)
    }

    /// Adds a device, or puts it in the place of its former state.
    pub(super) fn put(&mut self, entry: Entry) {
        let index = entry.device.index;
        if let Some(former) = self.by_index.get(&index) {
            for key in &former.keys {
                self.by_key.remove(&key.public);
            }
        }
        for key in &entry.keys {
            self.by_key.insert(key.public, index);
        }
        let entry = Arc::new(entry);
        self.by_id.insert(entry.device.id.clone(), Arc::clone(&entry));
        self.by_index.insert(index, entry);
    }
}
