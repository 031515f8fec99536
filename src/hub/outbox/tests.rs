use super::*;
use crate::message::{MessageId, Origin, Protocol, Topic};
use bytes::Bytes;

const LIMITS: OutboxLimits =
    OutboxLimits { messages_max: 4, bytes_max: 1 << 20, crowded_wait: Duration::from_millis(100) };

fn delivery(n: u64, qos: Qos) -> Delivery {
    let message = Message {
        id: MessageId { epoch: 1, seq: n },
        ingested_ms: 0,
        topic: Topic::parse("dev/a/cmd/7/reboot").unwrap(),
        payload: Bytes::from_static(b"x"),
        qos,
        retain: false,
        origin: Origin { device: None, protocol: Protocol::Gateway, session: None },
        properties: None,
    };
    Delivery { message: Arc::new(message), qos, retain: false, terms: Terms::default(), ticket: None, repeated: false }
}

fn drain(outbox: &Outbox, into: &mut Drained) -> bool {
    outbox.poll_drain(&mut Context::from_waker(Waker::noop()), into, 100).is_ready()
}

#[derive(Default)]
struct Log(Mutex<Vec<u64>>);

impl Completion for Log {
    fn complete(&self, token: u64, outcome: Result<Receipt, Reject>) {
        assert!(outcome.is_ok());
        self.0.lock().push(token);
    }
}

#[test]
fn messages_come_out_in_the_order_they_went_in() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    for n in 0..3 {
        assert_ne!(outbox.push(delivery(n, Qos::AtMostOnce), Instant::now()), Pushed::Dropped);
    }
    let mut drained = Drained::default();
    assert!(drain(&outbox, &mut drained));
    assert_eq!(drained.deliveries.iter().map(|d| d.message.id.seq).collect::<Vec<_>>(), [0, 1, 2]);
    drained.deliveries.clear();
    assert!(!drain(&outbox, &mut drained));
}

#[test]
fn above_the_mark_qos_0_is_dropped_and_qos_1_withholds_the_acknowledgement() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    let now = Instant::now();
    for n in 0..4 {
        outbox.push(delivery(n, Qos::AtMostOnce), now);
    }
    assert_eq!(outbox.push(delivery(4, Qos::AtMostOnce), now), Pushed::Dropped);
    assert_eq!(outbox.push(delivery(5, Qos::AtLeastOnce), now), Pushed::Slow);
    assert_eq!(outbox.slow_since(), Some(now));
    assert_eq!(outbox.dropped(), 1);

    let log = Arc::new(Log::default());
    outbox.when_drained(log.clone(), 77, Receipt { id: MessageId::default(), receivers: 1 });
    assert!(log.0.lock().is_empty());
    let mut drained = Drained::default();
    drain(&outbox, &mut drained);
    assert_eq!(*log.0.lock(), [77]);
    assert_eq!(drained.deliveries.len(), 5);
    assert_eq!(outbox.slow_since(), None);
}

#[test]
fn slow_is_who_takes_nothing_or_keeps_publishers_waiting() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    let (now, mut drained) = (Instant::now(), Drained::default());
    let take = |drained: &mut Drained, count| {
        let _ = outbox.poll_drain(&mut Context::from_waker(Waker::noop()), drained, count);
        drained.deliveries.clear();
        drained.slow_since
    };
    for n in 0..8 {
        outbox.push(delivery(n, Qos::AtLeastOnce), now);
    }
    assert_eq!(take(&mut drained, 0), Some(now));
    assert_eq!(take(&mut drained, 1), None, "it moves");
    outbox.push(delivery(8, Qos::AtLeastOnce), now);
    outbox.when_drained(Arc::new(Log::default()), 1, Receipt { id: MessageId::default(), receivers: 1 });
    assert_eq!(take(&mut drained, 1), Some(now), "it moves, but somebody waits");
    assert_eq!(take(&mut drained, 5), None, "down to half");
}

#[test]
fn publishers_of_qos_0_wait_for_who_comes_down_and_no_longer_for_who_does_not() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    let began = Instant::now();
    let (mut cx, mut drained) = (Context::from_waker(Waker::noop()), Drained::default());
    let push = |n, after_ms| outbox.push(delivery(n, Qos::AtMostOnce), began + Duration::from_millis(after_ms));
    assert_eq!([push(0, 0), push(1, 0), push(2, 0)], [Pushed::Taken, Pushed::Taken, Pushed::Crowded]);
    let (mut one, mut other) = (None, None);
    assert!(outbox.poll_room(&mut cx, &mut one, began).is_pending());
    // Half is not enough to let them go, a quarter is.
    let _ = outbox.poll_drain(&mut cx, &mut drained, 1);
    assert!(outbox.poll_room(&mut cx, &mut one, began).is_pending());
    let _ = outbox.poll_drain(&mut cx, &mut drained, 1);
    assert!(outbox.poll_room(&mut cx, &mut one, began).is_ready());
    // It is full again, and nothing moves until the time is over: then it is filled up without a pause.
    assert_eq!([push(3, 1), push(4, 1)], [Pushed::Taken, Pushed::Crowded]);
    let at = |after_ms| began + Duration::from_millis(after_ms);
    assert!(outbox.poll_room(&mut cx, &mut other, at(100)).is_pending());
    assert!(outbox.poll_room(&mut cx, &mut other, at(101)).is_ready());
    assert_eq!([push(5, 101), push(6, 102)], [Pushed::Taken, Pushed::Dropped]);
    // Whoever ends keeps nobody waiting.
    drain(&outbox, &mut drained);
    assert_eq!([push(7, 200), push(8, 200), push(9, 200)], [Pushed::Taken, Pushed::Taken, Pushed::Crowded]);
    let mut last = None;
    assert!(outbox.poll_room(&mut cx, &mut last, at(200)).is_pending());
    outbox.end();
    assert!(outbox.poll_room(&mut cx, &mut last, at(200)).is_ready());
}

#[test]
fn the_hard_bound_refuses_even_qos_1() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    let results: Vec<Pushed> = (0..20).map(|n| outbox.push(delivery(n, Qos::AtLeastOnce), Instant::now())).collect();
    assert_eq!(results.iter().filter(|r| **r != Pushed::Dropped).count(), 16);
}

#[test]
fn a_parked_outbox_keeps_qos_1_up_to_its_mark_and_releases_who_waits() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    let now = Instant::now();
    for n in 0..3 {
        outbox.push(delivery(n, Qos::AtMostOnce), now);
    }
    for n in 3..6 {
        outbox.push(delivery(n, Qos::AtLeastOnce), now);
    }
    let log = Arc::new(Log::default());
    outbox.when_drained(log.clone(), 1, Receipt { id: MessageId::default(), receivers: 1 });
    outbox.park();
    assert_eq!(*log.0.lock(), [1]);
    assert_eq!(outbox.push(delivery(6, Qos::AtMostOnce), now), Pushed::Dropped);
    assert_eq!(outbox.push(delivery(7, Qos::AtLeastOnce), now), Pushed::Taken);
    assert_eq!(outbox.push(delivery(8, Qos::AtLeastOnce), now), Pushed::Dropped);
    outbox.unpark();
    let mut drained = Drained::default();
    drain(&outbox, &mut drained);
    assert_eq!(drained.deliveries.iter().map(|d| d.message.id.seq).collect::<Vec<_>>(), [3, 4, 5, 7]);
}

#[test]
fn a_closed_session_releases_its_publishers_and_takes_nothing_more() {
    let outbox = Outbox::new(SessionId(1), LIMITS);
    let now = Instant::now();
    for n in 0..6 {
        outbox.push(delivery(n, Qos::AtLeastOnce), now);
    }
    let log = Arc::new(Log::default());
    outbox.when_drained(log.clone(), 9, Receipt { id: MessageId::default(), receivers: 1 });
    outbox.close(CloseReason::TakenOver);
    outbox.close(CloseReason::ShuttingDown);
    assert_eq!(*log.0.lock(), [9]);
    assert_eq!(outbox.push(delivery(7, Qos::AtLeastOnce), now), Pushed::Dropped);
    let mut drained = Drained::default();
    drain(&outbox, &mut drained);
    assert_eq!(drained.close, Some(CloseReason::TakenOver));
}

/// Has what was asked of it, and answers when told.
#[derive(Default)]
struct Disk(Mutex<Vec<(Vec<u64>, Arc<Outbox>)>>);

impl Store for Disk {
    fn load(&self, positions: Vec<u64>, outbox: Arc<Outbox>) {
        self.0.lock().push((positions, outbox));
    }
}

impl Disk {
    /// Reads what was asked for, but for the positions that are gone.
    fn answer(&self, gone: &[u64]) -> usize {
        let asked = std::mem::take(&mut *self.0.lock());
        let message = |position| delivery(position, Qos::AtLeastOnce).message;
        let read = |position| (position, (!gone.contains(&position)).then(|| message(position)));
        asked.into_iter().map(|(positions, outbox)| outbox.loaded(positions.into_iter().map(read).collect())).sum()
    }
}

fn stored(outbox: &Outbox, position: u64) -> Ticket {
    let ticket = Ticket::new(position, outbox.reserve().unwrap());
    let delivery = Delivery { ticket: Some(ticket), ..delivery(position, Qos::AtLeastOnce) };
    assert!(outbox.push_stored(delivery).is_empty());
    ticket
}

#[test]
fn many_small_outboxes_are_bounded_together() {
    let total = Arc::new(Total::new(20_000));
    let outboxes: Vec<Outbox> = (0..100).map(|n| Outbox::counted(SessionId(n), LIMITS, &total)).collect();
    let big = |seq, qos| {
        let mut delivery = delivery(seq, qos);
        Arc::get_mut(&mut delivery.message).unwrap().payload = vec![0; 2000].into();
        delivery
    };
    let push_to = |outbox: &Outbox, qos| outbox.push(big(1, qos), Instant::now());
    let pushed: Vec<Pushed> = outboxes.iter().map(|outbox| push_to(outbox, Qos::AtMostOnce)).collect();
    let taken = pushed.iter().filter(|pushed| **pushed == Pushed::Taken).count();
    assert!((9..=10).contains(&taken) && pushed[taken..].iter().all(|pushed| *pushed == Pushed::Dropped), "{taken}");
    // What has to arrive is taken, and slows its publisher down; to four times the bound.
    let pushed: Vec<Pushed> = outboxes.iter().map(|outbox| push_to(outbox, Qos::AtLeastOnce)).collect();
    let slow = pushed.iter().filter(|pushed| **pushed == Pushed::Slow).count();
    assert!((25..=35).contains(&slow) && pushed[slow..].iter().all(|pushed| *pushed == Pushed::Dropped), "{slow}");
    // Whoever reads, makes room; so does whoever leaves.
    let mut drained = Drained::default();
    for outbox in &outboxes[..10] {
        drain(outbox, &mut drained);
    }
    assert_eq!(push_to(&outboxes[99], Qos::AtLeastOnce), Pushed::Slow);
    drop(outboxes);
    let outbox = Outbox::counted(SessionId(1), LIMITS, &total);
    assert_eq!(push_to(&outbox, Qos::AtMostOnce), Pushed::Taken);
}

fn positions(outbox: &Outbox) -> Vec<u64> {
    let mut drained = Drained::default();
    drain(outbox, &mut drained);
    drained.deliveries.iter().map(|d| d.message.id.seq).collect()
}

#[test]
fn a_persistent_session_reads_from_disk_what_did_not_fit_in_order() {
    let disk = Arc::new(Disk::default());
    let queue = SessionQueue::new(super::super::QueueLimits { messages_max: 100, bytes_max: 1 << 20 });
    let outbox = Outbox::persistent(SessionId(1), LIMITS, &Arc::default(), queue, 7, disk.clone());
    let tickets: Vec<Ticket> = (0..8).map(|position| stored(&outbox, position)).collect();
    // Its publishers never wait: the rest is on disk.
    assert_eq!(outbox.depth(), 4);
    assert_eq!(positions(&outbox), [0, 1, 2, 3]);
    stored(&outbox, 8);
    assert_eq!(disk.answer(&[5]), 1);
    assert_eq!(positions(&outbox), [4]);
    assert_eq!(disk.answer(&[]), 0);
    assert_eq!(positions(&outbox), [6, 7]);
    assert_eq!(disk.answer(&[]), 0);
    assert_eq!(positions(&outbox), [8]);
    assert_eq!(stored(&outbox, 9).id(), 10);
    assert_eq!(positions(&outbox), [9]);
    assert!(outbox.done(tickets[0]) && !outbox.done(tickets[0]));
    assert_eq!(outbox.stored_counts().0, 8);
    assert_eq!(outbox.changed_cursor().unwrap().before, 1);
    assert_eq!(outbox.changed_cursor(), None);
}

#[test]
fn a_parked_persistent_session_holds_no_message_and_gives_all_again() {
    let disk = Arc::new(Disk::default());
    let queue = SessionQueue::new(super::super::QueueLimits { messages_max: 100, bytes_max: 1 << 20 });
    let outbox = Outbox::persistent(SessionId(1), LIMITS, &Arc::default(), queue, 7, disk.clone());
    for position in 0..3 {
        stored(&outbox, position);
    }
    outbox.push(delivery(50, Qos::AtMostOnce), Instant::now());
    outbox.park_sent([1]);
    assert!(outbox.is_parked() && outbox.depth() == 0);
    stored(&outbox, 3);
    assert!(disk.0.lock().is_empty());
    outbox.unpark();
    let mut drained = Drained::default();
    assert!(!drain(&outbox, &mut drained));
    disk.answer(&[]);
    assert!(drain(&outbox, &mut drained));
    disk.answer(&[]);
    drain(&outbox, &mut drained);
    let seen: Vec<(u64, bool)> = drained.deliveries.iter().map(|d| (d.message.id.seq, d.repeated)).collect();
    assert_eq!(seen, [(0, true), (1, false), (2, false), (3, false)]);
    assert_eq!(outbox.clear_stored().iter().map(|left| left.position).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(outbox.stored_counts(), (0, 0));
}

#[test]
fn a_short_view_shows_the_short_topic() {
    let mut delivery = delivery(0, Qos::AtMostOnce);
    delivery.terms.view = View::Short { skip: "dev/a/cmd".len() as u16, prefix: "c" };
    assert_eq!(delivery.topic_parts(), ("c", "/7/reboot"));
}
