//! The theorems of the founding documents, and what happens around failures.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const MS: Duration = Duration::from_millis(1);

fn endpoints(weights: &[u32]) -> Vec<EndpointConfig> {
    let one = |(at, weight): (usize, &u32)| EndpointConfig {
        url: format!("http://10.0.0.{at}:80"),
        weight: *weight,
        priority: 0,
        in_flight_max: u32::MAX,
    };
    weights.iter().enumerate().map(one).collect()
}

fn settings(algorithm: Algorithm) -> Settings {
    Settings { algorithm, ..Settings::default() }
}

fn balancer(algorithm: Algorithm, weights: &[u32], now: Instant) -> Balancer {
    Balancer::new(settings(algorithm), &endpoints(weights), now)
}

fn counts(picks: impl Iterator<Item = EndpointIndex>, len: usize) -> Vec<u64> {
    let mut counts = vec![0; len];
    picks.for_each(|EndpointIndex(index)| counts[index] += 1);
    counts
}

fn any_algorithm() -> impl Strategy<Value = Algorithm> {
    prop::sample::select(Algorithm::ALL.to_vec())
}

#[test]
fn every_algorithm_reads_its_own_name_back() {
    for algorithm in Algorithm::ALL {
        let json = serde_json::to_value(algorithm).unwrap();
        assert_eq!(json, algorithm.as_str());
        assert_eq!(serde_json::from_value::<Algorithm>(json).unwrap(), algorithm);
    }
}

#[test]
fn without_endpoints_there_is_nothing_to_pick() {
    for algorithm in Algorithm::ALL {
        let now = Instant::now();
        assert_eq!(balancer(algorithm, &[], now).pick(Some(1), now, 1, &[]), None);
    }
}

#[test]
fn smooth_weighted_round_robin_spreads_the_heavy_one() {
    let now = Instant::now();
    let mut balancer = balancer(Algorithm::WeightedRoundRobin, &[5, 1, 1], now);
    let picks: Vec<usize> = (0..7).map(|_| balancer.pick(None, now, 0, &[]).unwrap().0).collect();
    assert_eq!(picks, [0, 0, 1, 0, 2, 0, 0]);
}

#[test]
fn a_weighted_turn_missed_while_busy_is_made_up_once() {
    let now = Instant::now();
    let mut configs = endpoints(&[1, 1]);
    configs[0].in_flight_max = 1;
    let mut balancer = Balancer::new(settings(Algorithm::WeightedRoundRobin), &configs, now);
    let first = balancer.pick(None, now, 0, &[]).unwrap();
    assert_eq!(first.0, 0);
    for _ in 0..50 {
        assert_eq!(balancer.pick(None, now, 0, &[]).unwrap().0, 1);
    }
    balancer.report(first, Outcome::Success, MS, now);
    let mut taken = 0;
    for _ in 0..20 {
        let picked = balancer.pick(None, now, 0, &[]).unwrap();
        balancer.report(picked, Outcome::Success, MS, now);
        taken += u32::from(picked.0 == 0);
    }
    assert!((10..=12).contains(&taken), "{taken}");
}

#[test]
fn the_next_group_serves_while_the_first_cannot() {
    for algorithm in Algorithm::ALL {
        let now = Instant::now();
        let mut configs = endpoints(&[1, 1, 1]);
        configs[2].priority = 1;
        let mut balancer = Balancer::new(settings(algorithm), &configs, now);
        let pick = |balancer: &mut Balancer, random| {
            let picked = balancer.pick(Some(random), now, random, &[]).unwrap();
            balancer.report(picked, Outcome::Success, MS, now);
            picked.0
        };
        assert!((0..50).all(|n| pick(&mut balancer, n) < 2), "{algorithm:?}");
        balancer.set_health(EndpointIndex(0), false, now);
        assert!((0..50).all(|n| pick(&mut balancer, n) == 1), "{algorithm:?}");
        balancer.set_health(EndpointIndex(1), false, now);
        assert!((0..50).all(|n| pick(&mut balancer, n) == 2), "{algorithm:?}");
        balancer.set_health(EndpointIndex(1), true, now);
        assert!((0..50).all(|n| pick(&mut balancer, n) == 1), "{algorithm:?}");
    }
}

#[test]
fn errors_in_a_row_eject_longer_each_time_and_half_at_most() {
    let mut now = Instant::now();
    let mut settings = settings(Algorithm::RoundRobin);
    settings.slow_start_ms = 0;
    settings.breaker.requests_min = 1_000_000;
    let mut balancer = Balancer::new(settings, &endpoints(&[1, 1]), now);
    let fail = |balancer: &mut Balancer, index: usize, now| {
        for _ in 0..5 {
            balancer.endpoints[index].picked(now);
            balancer.report(EndpointIndex(index), Outcome::Failure, MS, now);
        }
    };
    fail(&mut balancer, 0, now);
    assert_eq!(balancer.statuses(now).map(|s| s.state).collect::<Vec<_>>(), [State::Ejected, State::Available]);
    fail(&mut balancer, 1, now);
    assert_eq!(balancer.statuses(now).nth(1).unwrap().state, State::Available, "the last one must stay");
    assert_eq!(balancer.returns_at(now), Some(now + Duration::from_secs(30)));
    now += Duration::from_secs(30);
    assert_eq!(balancer.statuses(now).next().unwrap().state, State::Available);
    fail(&mut balancer, 0, now);
    assert_eq!(balancer.returns_at(now), Some(now + Duration::from_secs(60)));
    now += Duration::from_secs(60);
    for _ in 0..200 {
        let picked = balancer.pick(None, now, 0, &[]).unwrap();
        balancer.report(picked, Outcome::Success, MS, now);
        now += Duration::from_secs(1);
    }
    assert_eq!(balancer.statuses(now).next().unwrap().ejections_in_a_row, 0);
}

#[test]
fn the_breaker_opens_by_share_tries_again_and_closes() {
    let mut now = Instant::now();
    let mut settings = settings(Algorithm::RoundRobin);
    settings.eject.percent_max = 0;
    let mut balancer = Balancer::new(settings, &endpoints(&[1]), now);
    let run = |balancer: &mut Balancer, outcome, now| {
        let picked = balancer.pick(None, now, 0, &[]);
        picked.inspect(|picked| balancer.report(*picked, outcome, MS, now)).is_some()
    };
    for n in 0..19 {
        assert!(run(&mut balancer, if n % 2 == 0 { Outcome::Failure } else { Outcome::Success }, now));
    }
    assert!(run(&mut balancer, Outcome::Failure, now), "below requests_min it stays closed");
    assert!(!run(&mut balancer, Outcome::Success, now), "11 errors of 20");
    assert_eq!(balancer.returns_at(now), Some(now + Duration::from_secs(5)));
    now += Duration::from_secs(5);
    assert!(run(&mut balancer, Outcome::Failure, now), "one trial");
    assert!(!run(&mut balancer, Outcome::Success, now), "it failed");
    now += Duration::from_secs(5);
    let trials: Vec<_> = (0..5).map_while(|_| balancer.pick(None, now, 0, &[])).collect();
    assert_eq!(trials.len(), 3);
    balancer.report(trials[0], Outcome::Cancelled, MS, now);
    let again = balancer.pick(None, now, 0, &[]).expect("a cancelled trial does not count");
    for picked in [again, trials[1], trials[2]] {
        assert_eq!(balancer.pick(None, now, 0, &[]), None);
        balancer.report(picked, Outcome::Success, MS, now);
    }
    assert!(run(&mut balancer, Outcome::Success, now));
    assert_eq!(balancer.in_flight(), 0);
}

#[test]
fn old_errors_leave_the_window() {
    let mut now = Instant::now();
    let mut settings = settings(Algorithm::RoundRobin);
    settings.eject.percent_max = 0;
    let mut balancer = Balancer::new(settings, &endpoints(&[1]), now);
    for _ in 0..100 {
        for outcome in [Outcome::Failure, Outcome::Success, Outcome::Success] {
            let picked = balancer.pick(None, now, 0, &[]).unwrap();
            balancer.report(picked, outcome, MS, now);
        }
        now += Duration::from_secs(1);
    }
}

#[test]
fn a_returning_endpoint_starts_slowly_and_reaches_its_share() {
    for algorithm in [Algorithm::RoundRobin, Algorithm::WeightedRoundRobin, Algorithm::Random] {
        let start = Instant::now();
        let mut balancer = balancer(algorithm, &[1, 1], start);
        balancer.set_health(EndpointIndex(0), false, start);
        balancer.set_health(EndpointIndex(0), true, start);
        let mut share = |at: Instant| {
            let picks = (0..2_000u64).map(|n| {
                let picked = balancer.pick(None, at, hash::mix(n), &[]).unwrap();
                balancer.report(picked, Outcome::Success, MS, at);
                picked
            });
            counts(picks, 2)[0] as f64 / 2_000.0
        };
        let (cold, half, warm) =
            (share(start), share(start + Duration::from_secs(5)), share(start + Duration::from_secs(10)));
        assert!((0.03..0.16).contains(&cold), "{algorithm:?} {cold}");
        assert!((0.25..0.45).contains(&half), "{algorithm:?} {half}");
        assert!((0.45..0.55).contains(&warm), "{algorithm:?} {warm}");
    }
}

#[test]
fn least_response_time_prefers_the_fast_one_and_gives_the_slow_one_another_chance() {
    let mut now = Instant::now();
    let mut balancer = balancer(Algorithm::LeastResponseTime, &[1, 1], now);
    let mut random = 0;
    let mut run = |balancer: &mut Balancer, slow_ms: u32, now: Instant| {
        random += 1;
        let picked = balancer.pick(None, now, hash::mix(random), &[]).unwrap();
        let latency = if picked.0 == 0 { MS * slow_ms } else { MS * 10 };
        balancer.report(picked, Outcome::Success, latency, now);
        picked
    };
    let picks: Vec<_> = (0..1_000)
        .map(|_| {
            now += MS;
            run(&mut balancer, 500, now)
        })
        .collect();
    assert!(counts(picks.into_iter(), 2)[0] <= 2);
    let picks: Vec<_> = (0..60_000)
        .map(|_| {
            now += MS;
            run(&mut balancer, 1, now)
        })
        .collect();
    assert!(counts(picks.into_iter(), 2)[0] > 10_000, "once fast, it is used again");
}

#[test]
fn a_fast_failure_does_not_attract() {
    let mut now = Instant::now();
    let mut settings = settings(Algorithm::LeastResponseTime);
    settings.eject.percent_max = 0;
    settings.breaker.requests_min = 1_000_000;
    let mut balancer = Balancer::new(settings, &endpoints(&[1, 1, 1]), now);
    let picks: Vec<_> = (0..3_000)
        .map(|n| {
            now += MS;
            let picked = balancer.pick(None, now, hash::mix(n), &[]).unwrap();
            let (outcome, latency) =
                if picked.0 == 0 { (Outcome::Failure, Duration::ZERO) } else { (Outcome::Success, MS * 20) };
            balancer.report(picked, outcome, latency, now);
            picked
        })
        .collect();
    assert!(counts(picks.into_iter(), 3)[0] < 30);
}

#[test]
fn adaptive_follows_what_it_sees() {
    let mut now = Instant::now();
    let mut balancer = balancer(Algorithm::Adaptive, &[1, 1], now);
    let mut random = 0;
    let mut run = |balancer: &mut Balancer, now: &mut Instant, slow_ms: u32| {
        for _ in 0..400 {
            *now += MS * 100;
            random += 1;
            let picked = balancer.pick(None, *now, hash::mix(random), &[]).unwrap();
            balancer.report(picked, Outcome::Success, if picked.0 == 0 { MS * slow_ms } else { MS * 10 }, *now);
        }
        balancer.chooser.adapted()
    };
    assert_eq!(run(&mut balancer, &mut now, 10), Some(Algorithm::LeastConnections));
    assert_eq!(run(&mut balancer, &mut now, 500), Some(Algorithm::LeastResponseTime));
    assert_eq!(run(&mut balancer, &mut now, 10), Some(Algorithm::LeastConnections));
    let mut weighted = super::Balancer::new(settings(Algorithm::Adaptive), &endpoints(&[1, 3]), now);
    assert_eq!(run(&mut weighted, &mut now, 10), Some(Algorithm::WeightedRoundRobin));
}

#[test]
fn a_reload_keeps_what_is_known_about_the_endpoints_that_stay() {
    let now = Instant::now();
    let mut old = balancer(Algorithm::RoundRobin, &[1, 1], now);
    old.set_health(EndpointIndex(1), false, now);
    old.pick(None, now, 0, &[]).unwrap();
    let mut configs = endpoints(&[1, 1, 1]);
    configs.reverse();
    let mut new = Balancer::new(settings(Algorithm::RoundRobin), &configs, now);
    new.inherit(&old);
    let states: Vec<_> = new.statuses(now).map(|s| s.state).collect();
    assert_eq!(states, [State::Available, State::Unhealthy, State::Available]);
    assert_eq!(new.in_flight(), 0);
}

#[test]
fn the_same_address_keeps_its_endpoint_while_that_one_is_there() {
    let now = Instant::now();
    let mut balancer = balancer(Algorithm::IpHash, &[1, 2, 3], now);
    let homes: Vec<usize> = (0..300u64).map(|key| balancer.pick(Some(key), now, key, &[]).unwrap().0).collect();
    let shares = counts(homes.iter().map(|h| EndpointIndex(*h)), 3);
    assert!(shares[0] > 25 && shares[1] > 70 && shares[2] > 110, "{shares:?}");
    balancer.set_health(EndpointIndex(2), false, now);
    for (key, home) in homes.iter().enumerate() {
        let picked = balancer.pick(Some(key as u64), now, 9, &[]).unwrap().0;
        assert!(picked == *home || *home == 2, "only keys of the absent one move");
    }
    balancer.set_health(EndpointIndex(2), true, now);
    for (key, home) in homes.iter().enumerate() {
        assert_eq!(balancer.pick(Some(key as u64), now, 7, &[]).unwrap().0, *home);
    }
}

/// Homes of many keys, each asked for alone so that bounded load does not interfere.
fn homes(configs: &[EndpointConfig], keys: u64, now: Instant) -> Vec<String> {
    let mut balancer = Balancer::new(settings(Algorithm::ConsistentHash), configs, now);
    (0..keys)
        .map(|key| {
            let picked = balancer.pick(Some(hash::mix(key)), now, 0, &[]).unwrap();
            balancer.report(picked, Outcome::Success, MS, now);
            configs[picked.0].url.clone()
        })
        .collect()
}

#[test]
fn a_node_added_takes_its_share_and_nothing_else_moves() {
    let now = Instant::now();
    for nodes in 1..9usize {
        let configs = endpoints(&vec![1; nodes + 1]);
        let before = homes(&configs[..nodes], 4_000, now);
        let after = homes(&configs, 4_000, now);
        let newcomer = &configs[nodes].url;
        let mut moved = 0;
        for (old, new) in before.iter().zip(&after) {
            assert!(old == new || new == newcomer, "a key moved between old nodes");
            moved += u32::from(old != new);
        }
        let share = 4_000.0 / (nodes as f64 + 1.0);
        assert!((f64::from(moved) - share).abs() < share * 0.2, "{moved} of {share}");
        // Read backwards the same is: a node removed moves only its own keys.
    }
}

proptest! {
    #[test]
    fn round_robin_gives_everyone_the_floor_or_the_ceiling(nodes in 1usize..12, requests in 0u64..500) {
        let now = Instant::now();
        let mut balancer = balancer(Algorithm::RoundRobin, &vec![1; nodes], now);
        let counts = counts((0..requests).map(|n| balancer.pick(None, now, n, &[]).unwrap()), nodes);
        let k = nodes as u64;
        prop_assert!(counts.iter().all(|c| *c == requests / k || *c == requests.div_ceil(k)), "{counts:?}");
    }

    #[test]
    fn weighted_round_robin_is_exact_over_every_cycle(weights in prop::collection::vec(1u32..20, 1..8), cycles in 1u32..4) {
        let now = Instant::now();
        let mut balancer = balancer(Algorithm::WeightedRoundRobin, &weights, now);
        let total: u32 = weights.iter().sum();
        for _ in 0..cycles {
            let counts = counts((0..total).map(|_| balancer.pick(None, now, 0, &[]).unwrap()), weights.len());
            let shares: Vec<u64> = weights.iter().map(|w| u64::from(*w)).collect();
            prop_assert_eq!(&counts, &shares);
        }
        prop_assert_eq!(balancer.balance_ratio(), Some(1.0));
    }

    #[test]
    fn least_connections_picks_a_minimum_and_keeps_the_maximum_lowest(
        nodes in 1usize..8, steps in prop::collection::vec(any::<prop::sample::Index>().prop_flat_map(|i| (Just(i), any::<bool>())), 1..200),
    ) {
        let now = Instant::now();
        let mut balancer = balancer(Algorithm::LeastConnections, &vec![1; nodes], now);
        let mut open: Vec<EndpointIndex> = Vec::new();
        for (which, arrives) in steps {
            let loads: Vec<u32> = balancer.statuses(now).map(|s| s.in_flight).collect();
            if arrives || open.is_empty() {
                let picked = balancer.pick(None, now, 0, &[]).unwrap();
                let min = *loads.iter().min().unwrap();
                prop_assert_eq!(loads[picked.0], min);
                // No placement of this arrival gives a lower maximum.
                let max = *loads.iter().max().unwrap();
                prop_assert_eq!(balancer.statuses(now).map(|s| s.in_flight).max().unwrap(), max.max(min + 1));
                open.push(picked);
            } else {
                let gone = open.swap_remove(which.index(open.len()));
                balancer.report(gone, Outcome::Success, MS, now);
            }
        }
    }

    #[test]
    fn only_available_endpoints_are_picked_loads_add_up_and_caps_hold(
        algorithm in any_algorithm(),
        configs in prop::collection::vec((1u32..10, 0u8..3, 1u32..6), 1..8),
        steps in prop::collection::vec((0u8..10, any::<u64>(), 0u64..2_000), 1..300),
    ) {
        let mut now = Instant::now();
        let configs: Vec<EndpointConfig> = configs.into_iter().enumerate().map(|(at, (weight, priority, in_flight_max))| EndpointConfig {
            url: format!("http://10.0.0.{at}"), weight, priority, in_flight_max,
        }).collect();
        let mut balancer = Balancer::new(settings(algorithm), &configs, now);
        let mut open: HashMap<usize, u32> = HashMap::new();
        for (what, random, wait) in steps {
            now += MS * wait as u32;
            let index = EndpointIndex(random as usize % configs.len());
            match what {
                0 => balancer.set_health(index, random & 64 == 0, now),
                1..=5 => {
                    let states: Vec<State> = balancer.statuses(now).map(|s| s.state).collect();
                    let may = |i: usize| i != index.0 && matches!(states[i], State::Available | State::HalfOpen);
                    let group = (0..configs.len()).filter(|i| may(*i)).map(|i| configs[i].priority).min();
                    match balancer.pick(Some(random), now, random, &[index]) {
                        Some(picked) => {
                            prop_assert!(may(picked.0), "{:?} {states:?}", picked);
                            prop_assert_eq!(Some(configs[picked.0].priority), group);
                            *open.entry(picked.0).or_default() += 1;
                        }
                        None => prop_assert_eq!(group, None, "an endpoint was available: {:?}", states),
                    }
                }
                _ => {
                    let outcome = [Outcome::Success, Outcome::Failure, Outcome::Cancelled][random as usize % 3];
                    if let Some(count) = open.get_mut(&index.0).filter(|count| **count > 0) {
                        *count -= 1;
                        balancer.report(index, outcome, MS * (random % 700) as u32, now);
                    }
                }
            }
            for (at, status) in balancer.statuses(now).enumerate() {
                prop_assert_eq!(status.in_flight, open.get(&at).copied().unwrap_or(0));
                prop_assert!(status.in_flight <= configs[at].in_flight_max);
            }
            prop_assert_eq!(balancer.in_flight(), open.values().map(|c| u64::from(*c)).sum::<u64>());
        }
    }

    #[test]
    fn every_available_endpoint_can_be_picked(algorithm in any_algorithm(), weights in prop::collection::vec(1u32..5, 1..6), seed: u64) {
        let mut now = Instant::now();
        let mut balancer = balancer(algorithm, &weights, now);
        let picks: Vec<_> = (0..3_000u64).map(|n| {
            now += MS * 20;
            let random = hash::mix(seed ^ n);
            let picked = balancer.pick(Some(random), now, random, &[]).unwrap();
            balancer.report(picked, Outcome::Success, MS * (picked.0 as u32 + 1), now);
            picked
        }).collect();
        let counts = counts(picks.into_iter(), weights.len());
        prop_assert!(counts.iter().all(|c| *c > 0), "{algorithm:?} {counts:?}");
    }

    #[test]
    fn a_failed_nodes_load_moves_to_the_healthy_ones_and_returns(algorithm in any_algorithm(), nodes in 2usize..6, seed: u64) {
        let mut now = Instant::now();
        let mut balancer = balancer(algorithm, &vec![1; nodes], now);
        let mut n = seed;
        let mut round = |balancer: &mut Balancer, now: &mut Instant| {
            let picks: Vec<_> = (0..600).map(|_| {
                n = n.wrapping_add(1);
                *now += MS * 20;
                let picked = balancer.pick(Some(hash::mix(n)), *now, hash::mix(n), &[]).unwrap();
                balancer.report(picked, Outcome::Success, MS * 5, *now);
                picked
            }).collect();
            counts(picks.into_iter(), nodes)
        };
        balancer.set_health(EndpointIndex(0), false, now);
        prop_assert_eq!(round(&mut balancer, &mut now)[0], 0);
        balancer.set_health(EndpointIndex(0), true, now);
        now += Duration::from_secs(60);
        let counts = round(&mut balancer, &mut now);
        prop_assert!(counts[0] > 0, "{algorithm:?} {counts:?}");
    }

    #[test]
    fn no_node_exceeds_its_bounded_share_under_consistent_hashing(nodes in 1usize..8, keys in prop::collection::vec(0u64..4, 1..200)) {
        let now = Instant::now();
        let mut balancer = balancer(Algorithm::ConsistentHash, &vec![1; nodes], now);
        for (before, key) in keys.into_iter().enumerate() {
            balancer.pick(Some(key), now, 0, &[]).unwrap();
            let bound = (125 * (before as u64 + 1)).div_ceil(100 * nodes as u64);
            prop_assert!(balancer.statuses(now).all(|s| u64::from(s.in_flight) <= bound));
        }
    }
}
