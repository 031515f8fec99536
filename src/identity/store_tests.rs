//! The files behind identity: what happens when they are missing, damaged, open to others, or changed by two at once.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tidegate_auth::SecretKey;

use super::*;

fn id(text: &str) -> DeviceId {
    DeviceId::parse(text).unwrap()
}

fn key(seed: u8) -> NewKey {
    let public = SecretKey::from_seed(&[seed; 32]).public();
    NewKey { public, not_before: None, not_after: None }
}

fn device(name: &str, keys: &[u8]) -> NewDevice {
    NewDevice {
        id: id(name),
        role: "sensor".into(),
        attributes: vec![("b".into(), "2".into()), ("a".into(), "1 \"x\"".into())],
        keys: keys.iter().map(|seed| key(*seed)).collect(),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn open(dir: &Path) -> Result<Identity, Error> {
    Identity::open(dir, &Config::default())
}

// The registry.

#[test]
fn a_first_start_makes_a_private_registry_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a/b");
    let identity = open(&data).unwrap();
    assert_eq!(identity.device_count(), 0);
    assert_eq!((mode(&data), mode(&data.join("registry.db")), mode(&data.join("gateway.key"))), (0o700, 0o600, 0o600));
    let public = fs::read_to_string(data.join("gateway.pub")).unwrap();
    assert_eq!(tidegate_auth::keyfile::public_from_text(&public), Ok(identity.gateway().public));
    let id = identity.gateway().id;
    drop(identity);
    assert_eq!(open(&data).unwrap().gateway().id, id);
    // No drafts are left behind.
    let names: Vec<String> =
        fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| !name.contains(".new")), "{names:?}");
}

#[test]
fn what_was_added_is_read_back_with_sorted_attributes() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    let timed = NewKey { not_before: Some(5), not_after: Some(6), ..key(2) };
    let mut new = device("s", &[1]);
    new.keys.push(timed);
    registry.add(&[new], 77, |_| {}).unwrap();
    let record = Registry::open(dir.path()).unwrap().get(&id("s")).unwrap().unwrap();
    assert_eq!((record.generation, record.enabled, record.created_unix, record.index), (1, true, 77, 1));
    assert_eq!(record.attributes, [("a".into(), "1 \"x\"".into()), ("b".into(), "2".into())]);
    let mut keys: Vec<_> = record.keys.iter().map(|k| (k.public, k.not_before, k.not_after, k.added_unix)).collect();
    keys.sort();
    let mut expected = vec![(key(1).public, None, None, 77), (timed.public, Some(5), Some(6), 77)];
    expected.sort();
    assert_eq!(keys, expected);
    assert_eq!(registry.get(&id("t")).unwrap(), None);
}

#[test]
fn devices_are_added_all_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    registry.add(&[device("a", &[1])], 0, |_| {}).unwrap();
    let twice = registry.add(&[device("b", &[2]), device("a", &[3])], 0, |_| {}).unwrap_err();
    assert!(matches!(&twice, Error::DeviceExists(name) if *name == id("a")), "{twice}");
    let taken = registry.add(&[device("b", &[2]), device("c", &[1])], 0, |_| {}).unwrap_err();
    assert!(matches!(&taken, Error::KeyTaken { device, .. } if *device == id("a")), "{taken}");
    let many = registry.add(&[device("b", &[2]), device("c", &[3, 4, 5, 6, 7])], 0, |_| {}).unwrap_err();
    assert!(matches!(&many, Error::TooManyKeys(name) if *name == id("c")), "{many}");
    let names: Vec<_> = registry.list().unwrap().into_iter().map(|record| record.id).collect();
    assert_eq!(names, [id("a")]);
    assert_eq!(registry.owner_of(&key(2).public).unwrap(), None);
}

#[test]
fn every_change_raises_the_generation_and_a_refused_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    registry.add(&[device("a", &[1])], 0, |_| {}).unwrap();
    assert_eq!(registry.add_key(&id("a"), &key(2), 0).unwrap().generation, 2);
    assert_eq!(registry.remove_key(&id("a"), key(1).public.key_id()).unwrap().generation, 3);
    assert_eq!(registry.set_enabled(&id("a"), false).unwrap().generation, 4);
    assert_eq!(registry.set_enabled(&id("a"), true).unwrap().generation, 5);
    assert!(matches!(registry.add_key(&id("a"), &key(2), 0), Err(Error::KeyTaken { .. })));
    assert!(matches!(registry.remove_key(&id("a"), key(1).public.key_id()), Err(Error::UnknownKey { .. })));
    for seed in 3..=5 {
        registry.add_key(&id("a"), &key(seed), 0).unwrap();
    }
    assert!(matches!(registry.add_key(&id("a"), &key(6), 0), Err(Error::TooManyKeys(_))));
    assert_eq!(registry.get(&id("a")).unwrap().unwrap().generation, 8);
    for outcome in [
        registry.set_enabled(&id("x"), true).map(|_| ()),
        registry.add_key(&id("x"), &key(9), 0).map(|_| ()),
        registry.remove_key(&id("x"), key(9).public.key_id()).map(|_| ()),
    ] {
        assert!(matches!(outcome, Err(Error::UnknownDevice(_))), "{outcome:?}");
    }
}

#[test]
fn a_damaged_registry_is_an_error_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    for bytes in [&b""[..], b"x", &[0x5a; 8192], b"SQLite format 3\0 and nothing else"] {
        fs::write(&path, bytes).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::NotOurs { .. }), "{error:?}");
        assert_eq!(error.blame(), Blame::Input);
        assert!(error.to_string().contains("registry.db"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn damage_in_the_middle_of_a_registry_is_found_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    let many: Vec<NewDevice> = (0..500).map(|n| device(&format!("device-{n}"), &[])).collect();
    GatewayKey::open(dir.path(), &registry).unwrap();
    registry.add(&many, 0, |_| {}).unwrap();
    drop(registry);
    let path = dir.path().join("registry.db");
    let whole = fs::read(&path).unwrap();
    let page = 4096;
    assert!(whole.len() > 8 * page);
    let mut found = 0;
    for at in (1..whole.len() / page).map(|n| n * page) {
        let mut bytes = whole.clone();
        bytes[at..at + page].fill(0x5a);
        fs::write(&path, &bytes).unwrap();
        match open(dir.path()) {
            Err(Error::Corrupt { .. }) => found += 1,
            other => panic!("page at {at}: {other:?}"),
        }
    }
    assert_eq!(found, whole.len() / page - 1);
    fs::write(&path, &whole).unwrap();
    assert_eq!(open(dir.path()).unwrap().device_count(), 500);
}

#[test]
fn another_program_s_database_and_a_later_version_s_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    let foreign = rusqlite::Connection::open(&path).unwrap();
    foreign.execute_batch("CREATE TABLE recipes (name TEXT)").unwrap();
    drop(foreign);
    assert!(matches!(open(dir.path()).unwrap_err(), Error::NotOurs { .. }));
    fs::remove_file(&path).unwrap();
    drop(Registry::open(dir.path()).unwrap());
    let later = rusqlite::Connection::open(&path).unwrap();
    later.pragma_update(None, "user_version", 99).unwrap();
    drop(later);
    assert!(matches!(open(dir.path()).unwrap_err(), Error::TooNew { version: 99, .. }));
}

#[test]
fn a_row_that_we_never_wrote_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    let path = dir.path().join("registry.db");
    let meddler = rusqlite::Connection::open(&path).unwrap();
    let sql = "INSERT INTO device (id, role, attributes, generation, enabled, created, changed)
               VALUES ('a/b', 'sensor', '{}', 1, 1, 0, 1000);
               UPDATE registry SET revision = 1000";
    meddler.execute_batch(sql).unwrap();
    drop(meddler);
    let error = open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("a/b"), "{error}");
}

#[test]
fn a_registry_that_breaks_under_a_running_gateway_leaves_what_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    GatewayKey::open(dir.path(), &registry).unwrap();
    registry.add(&[device("a", &[1])], 0, |_| {}).unwrap();
    let identity = open(dir.path()).unwrap();
    let meddler = rusqlite::Connection::open(dir.path().join("registry.db")).unwrap();
    meddler
        .execute_batch("UPDATE device SET attributes = 'x', changed = 50; UPDATE registry SET revision = 50")
        .unwrap();
    assert!(matches!(identity.refresh(), Err(Error::Corrupt { .. })));
    assert!(identity.device(&id("a")).is_some());
    // Mended, it is taken over.
    meddler.execute_batch("UPDATE device SET attributes = '{}', enabled = 0").unwrap();
    identity.refresh().unwrap();
    assert!(identity.device(&id("a")).is_none());
}

#[test]
fn a_data_directory_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let error = open(&file.join("data")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    assert!(error.to_string().contains("data"), "{error}");
}

#[test]
fn two_that_start_at_once_agree_on_one_identity() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<GatewayId> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    let registry = Registry::open(dir.path()).unwrap();
                    GatewayKey::open(dir.path(), &registry).unwrap().id
                })
            })
            .collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
}

#[test]
fn writers_wait_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    drop(Registry::open(dir.path()).unwrap());
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = dir.path();
            scope.spawn(move || {
                let mut registry = Registry::open(path).unwrap();
                for n in 0..10 {
                    registry.add(&[device(&format!("w{writer}-{n}"), &[])], 0, |_| {}).unwrap();
                }
            });
        }
    });
    assert_eq!(Registry::open(dir.path()).unwrap().device_count().unwrap(), 40);
}

// The gateway's key.

#[test]
fn a_key_that_others_can_read_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    let path = dir.path().join("gateway.key");
    for mode in [0o644, 0o640, 0o604, 0o660] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Permissions { .. }), "{error:?}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    assert!(open(dir.path()).is_ok());
}

#[test]
fn a_key_file_that_holds_no_key_is_an_error_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    let path = dir.path().join("gateway.key");
    for text in ["", "not a key", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"] {
        fs::write(&path, text).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::GatewayKey { .. }), "{error:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(open(dir.path()).is_err());
}

#[test]
fn a_lost_key_is_not_replaced_while_devices_know_the_gateway_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = Registry::open(dir.path()).unwrap();
    drop(open(dir.path()).unwrap());
    registry.add(&[device("a", &[1])], 0, |_| {}).unwrap();
    fs::remove_file(dir.path().join("gateway.key")).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::GatewayKeyLost { .. }), "{error:?}");
    assert!(!dir.path().join("gateway.key").exists());
}

// The memory of used tokens.

#[test]
fn a_damaged_memory_of_used_tokens_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    fs::write(dir.path().join("replay.db"), [0x5a; 8192]).unwrap();
    drop(open(dir.path()).unwrap());
    assert_eq!(fs::read(dir.path().join("replay.db.damaged")).unwrap(), [0x5a; 8192]);
    assert!(fs::read(dir.path().join("replay.db")).unwrap().starts_with(b"SQLite format 3\0"));
}

#[test]
fn expired_tokens_leave_the_memory_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let now = Now { unix_secs: 1_000, boot_secs: 0 };
    let mut used = UsedSet::new(10, 10);
    let mut replay = replay::Replay::open(dir.path(), &mut used, &mut Default::default(), now).unwrap();
    let of = |n: u8, expires_unix| replay::Used::Jti(replay::UsedJti { device_index: 1, jti: [n; 16], expires_unix });
    replay.remember(&[of(1, 1_010), of(2, 1_020), of(2, 1_020)]).unwrap();
    replay.forget_expired(Now { unix_secs: 1_010, ..now }).unwrap();
    drop(replay);
    // Even by the earlier clock, only one is left.
    let mut used = UsedSet::new(10, 10);
    drop(replay::Replay::open(dir.path(), &mut used, &mut Default::default(), now).unwrap());
    assert_eq!(used.len(), 1);
    assert!(used.contains(1, &[2; 16]));
}
