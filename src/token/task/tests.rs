//! The task against a scripted upstream and a scripted store, on paused time.

mod script;
mod simulation;

use std::future::Future;

use futures_util::future::join_all;
use http::StatusCode;
use tokio::task::yield_now;
use tokio::time::sleep;

use super::*;
use crate::token::store::Operation;
use crate::token::{ActiveToken, Unavailable};
use script::{Deed, Mint, Rig, World, authorization, pair, token_file};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const WAIT: Duration = Duration::from_secs(10);
const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;
const EVERYTHING: [Operation; 3] = [Operation::Read, Operation::Write, Operation::Lock];

/// Lets the task do all that it can do without time passing.
async fn settle() {
    for _ in 0..50 {
        yield_now().await;
    }
}

fn generation(verdict: &Verdict) -> Option<u64> {
    match verdict {
        Verdict::Relay => None,
        Verdict::Replay(token) => Some(token.generation),
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(24 * HOUR, future).await.expect("it comes to an end")
}

// ---- start ----

/// C07: one mint for all; a waiter that leaves does not cancel it.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c07_a_thousand_first_requests_share_one_mint() {
    let world = World::new();
    world.mint_takes(2 * SECOND);
    let rig = Rig::start(&world, pair("p1"));
    let leaves = timeout(SECOND, rig.tokens.wait(WAIT)).await;
    assert!(leaves.is_err());
    let tokens = join_all((0..1000).map(|_| rig.tokens.wait(WAIT))).await;
    assert!(tokens.iter().all(|token| token.as_ref().unwrap().generation == 1));
    assert_eq!(world.deeds(), [Deed::Mint(0)]);
    assert_eq!((rig.status().state, rig.status().usable, rig.status().started, rig.status().mints_left), ("usable", true, true, 5));
}

/// C01, C02, C03: an upstream that cannot be reached; the way back needs nobody.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c01_recovers_from_an_unreachable_upstream() {
    let world = World::new();
    world.mints_are(Mint::Retry("connection refused", None));
    let rig = Rig::start(&world, pair("p1"));
    let Unavailable { retry_after } = rig.tokens.wait(WAIT).await.unwrap_err();
    assert!(retry_after >= SECOND && retry_after <= MINUTE, "{retry_after:?}");
    sleep(HOUR).await;
    let status = rig.status();
    assert_eq!((status.started, status.usable, status.mints_left), (false, false, 6), "nothing was counted");
    assert!(status.reasons[0].contains("connection refused"), "{:?}", status.reasons);
    let tries = world.deeds().len();
    assert!((60..400).contains(&tries), "{tries} tries in an hour");

    world.mints_are(Mint::Succeeds);
    sleep(MINUTE).await;
    assert!(rig.tokens.current().is_some() && rig.status().reasons.is_empty());
}

/// C04: tried after a minute, then hourly, at once when the credentials change; the status names the files.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c04_rejected_credentials_wait_for_others() {
    let world = World::new();
    world.mints_are(Mint::Rejected);
    let rig = Rig::start(&world, pair("p1"));
    sleep(3 * HOUR).await;
    assert_eq!(world.times(Deed::Mint(0)).len(), 1 + 1 + 2, "{:?}", world.deeds());
    let status = rig.status();
    assert_eq!((status.state, status.last_mint.unwrap().0), ("credentials_rejected", "rejected"));
    assert!(
        status.reasons[0].starts_with("the upstream rejected the credentials from file of p1 (HTTP 403); next try at "),
        "{:?}",
        status.reasons
    );

    world.mints_are(Mint::Succeeds);
    rig.credentials.send_replace(pair("p2"));
    settle().await;
    assert_eq!(rig.tokens.current().unwrap().generation, 1);
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn c34_waits_for_credentials() {
    let world = World::new();
    let rig = Rig::start(&world, Loaded::Missing { reason: "/secrets/password: is empty".to_owned() });
    sleep(HOUR).await;
    assert_eq!((world.deeds().len(), rig.status().state), (0, "waiting_for_credentials"));
    assert_eq!(rig.status().reasons, ["waiting for the credentials: /secrets/password: is empty"]);
    rig.credentials.send_replace(pair("p1"));
    assert_eq!(rig.tokens.wait(WAIT).await.unwrap().generation, 1);
    // C34: a file that is emptied later takes nothing away.
    rig.credentials.send_replace(Loaded::Missing { reason: "empty".to_owned() });
    settle().await;
    assert!(rig.tokens.current().is_some());
}

// ---- rejection ----

/// C20, C22: one probe, one mint, everybody replays.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c22_two_thousand_rejections_share_one_probe_and_one_mint() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let token = rig.tokens.wait(WAIT).await.unwrap();
    sleep(2 * MINUTE).await;
    world.kill("t1");
    world.mint_takes(SECOND);
    world.forget_deeds();
    let verdicts = join_all((0..2000).map(|_| rig.tokens.reject(&token, FORBIDDEN, true, WAIT))).await;
    assert!(verdicts.iter().all(|verdict| generation(verdict) == Some(2)));
    assert_eq!(world.deeds(), [Deed::Probe("t1"), Deed::Mint(1)]);
    // One that comes late mints nothing.
    assert_eq!(generation(&rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await), Some(2));
    assert_eq!(world.deeds().len(), 2);
}

/// C18, C19: five clients poll ten times a second what they may not see.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c19_an_honest_403_costs_one_probe_per_interval_and_no_mint() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let token = rig.tokens.wait(WAIT).await.unwrap();
    world.forget_deeds();
    for _ in 0..600 {
        let verdicts = join_all((0..5).map(|_| rig.tokens.reject(&token, FORBIDDEN, true, WAIT))).await;
        assert!(verdicts.iter().all(|verdict| generation(verdict).is_none()));
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(world.deeds(), [Deed::Probe("t1"), Deed::Probe("t1")], "a minute, a probe every 30 s");
    assert!(rig.tokens.current().is_some());
}

/// C23: within the interval of its mint a dead token is not replaced; it is not sent either.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c23_a_young_dead_token_waits_for_its_turn() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let token = rig.tokens.wait(WAIT).await.unwrap();
    sleep(20 * SECOND).await;
    world.kill("t1");
    assert_eq!(generation(&rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await), None, "relayed");
    assert!(rig.tokens.current().is_none());
    let status = rig.status();
    assert_eq!((status.usable, status.started, status.state), (false, true, "waiting_to_mint"));
    assert!(status.reasons.iter().any(|reason| reason.contains("min_mint_interval")), "{:?}", status.reasons);
    let Unavailable { retry_after } = rig.tokens.wait(WAIT).await.unwrap_err();
    assert!((29..=30).contains(&retry_after.as_secs()), "{retry_after:?}");
    sleep(30 * SECOND).await;
    assert_eq!(rig.tokens.wait(WAIT).await.unwrap().generation, 2);
}

/// A token revoked again and again costs no more than the budget, and the status says why.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c52_a_day_of_revocations_stays_within_the_budget() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    for _ in 0..24 * 60 {
        if let Some(token) = rig.tokens.current() {
            world.kill_all();
            let _ = rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await;
        }
        sleep(MINUTE).await;
    }
    let mints: Vec<_> = world.mint_times();
    assert!(mints.windows(7).all(|seven| seven[6] - seven[0] >= HOUR), "six in any hour");
    assert!(mints.windows(2).all(|two| two[1] - two[0] >= MINUTE), "a minute apart");
    assert!((138..=150).contains(&mints.len()), "{} in a day", mints.len());
    let status = rig.status();
    assert!(
        status.usable || status.reasons.iter().any(|reason| reason.contains("mint_budget (6 per hour) is spent")),
        "{:?}",
        status.reasons
    );
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_verdict_comes_in_time_although_the_mint_does_not() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let token = rig.tokens.wait(WAIT).await.unwrap();
    sleep(2 * MINUTE).await;
    world.kill("t1");
    world.mint_takes(15 * SECOND);
    let started = Instant::now();
    assert_eq!(generation(&rig.tokens.reject(&token, StatusCode::UNAUTHORIZED, false, WAIT).await), None);
    assert_eq!(started.elapsed(), WAIT);
    assert_eq!(rig.tokens.wait(WAIT).await.unwrap().generation, 2, "the mint went on");
}

// ---- rotation ----

/// C40: there is a token at every moment of a rotation.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c40_a_rotation_goes_unnoticed() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    world.mint_takes(3 * SECOND);
    rig.credentials.send_replace(pair("p2"));
    let mut generations = Vec::new();
    for _ in 0..50 {
        generations.push(rig.tokens.current().expect("a token at every moment").generation);
        sleep(Duration::from_millis(100)).await;
    }
    generations.dedup();
    assert_eq!(generations, [1, 2]);
    assert_eq!(world.deeds(), [Deed::Mint(0), Deed::Mint(1)]);
    // C42: the same content again, however often.
    (0..1000).for_each(|_| drop(rig.credentials.send_replace(pair("p2"))));
    sleep(HOUR).await;
    assert_eq!(world.deeds().len(), 2);
}

/// C41: and back to the old ones.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c41_rejected_new_credentials_leave_the_old_token_in_use() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    world.mints_are(Mint::Rejected);
    rig.credentials.send_replace(pair("wrong"));
    settle().await;
    let status = rig.status();
    assert_eq!((status.usable, status.pending_rejected, status.generation), (true, true, 1));
    assert!(status.reasons[0].contains("file of wrong (HTTP 403); the token in hand stays in use"), "{:?}", status.reasons);
    assert!(rig.tokens.current().is_some());

    rig.credentials.send_replace(pair("p1"));
    sleep(2 * HOUR).await;
    assert_eq!((rig.status().pending_rejected, rig.status().reasons.len()), (false, 0));
    assert_eq!(world.mint_times().len(), 2, "no mint was needed");
}

/// Two valid passwords that swap every second: not one moment without a token, and no mint over the budget.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c40_a_swap_every_second_never_leaves_a_gap() {
    let world = World::new();
    world.mint_takes(Duration::from_millis(300));
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    for round in 0..600 {
        rig.credentials.send_replace(pair(if round % 2 == 0 { "p2" } else { "p1" }));
        for _ in 0..4 {
            assert!(rig.tokens.current().is_some());
            sleep(Duration::from_millis(250)).await;
        }
    }
    assert!(world.mint_times().len() <= 6);
}

/// C49: never a mint; the file is read again, and a new token is used at once.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c49_a_rejected_token_file_waits_for_another_token() {
    let world = World::new();
    let rig = Rig::start(&world, token_file("f1"));
    let token = rig.tokens.wait(WAIT).await.unwrap();
    assert_eq!((rig.status().source, rig.status().name.clone()), ("token_file", None));
    world.kill("f1");
    assert_eq!(generation(&rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await), None);
    assert_eq!((rig.status().state, rig.reloads.get(), rig.tokens.current().is_none()), ("token_rejected", 1, true));
    assert!(rig.tokens.wait(WAIT).await.is_err());
    rig.credentials.send_replace(token_file("f2"));
    assert_eq!(rig.tokens.wait(WAIT).await.unwrap().generation, 2);
    sleep(24 * HOUR).await;
    assert!(world.mint_times().is_empty());
}

// ---- refresh ----

#[tokio::test(flavor = "local", start_paused = true)]
async fn refresh_mints_within_the_budget() {
    let world = World::new();
    world.mint_takes(SECOND);
    let rig = Rig::start(&world, pair("p1"));
    assert_eq!(rig.control.refresh().await, Ok(()), "joins the first mint");
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    for _ in 0..5 {
        assert_eq!(rig.control.refresh().await, Ok(()));
        assert!(rig.tokens.current().is_some());
        sleep(2 * SECOND).await;
    }
    assert_eq!(rig.tokens.current().unwrap().generation, 6);
    let Err(RefreshRefused::TooMany { retry_after }) = rig.control.refresh().await else { panic!("the budget is spent") };
    assert!(retry_after > 59 * MINUTE && retry_after <= HOUR, "{retry_after:?}");
    assert_eq!(rig.status().mints_left, 0);
    sleep(HOUR).await;
    assert_eq!(rig.status().mints_left, 6, "the status follows the clock");
}

// ---- store ----

/// C31: ten processes on one store mint once.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c31_ten_processes_on_one_store_mint_once() {
    let world = World::new();
    world.mint_takes(2 * SECOND);
    world.persist();
    let rigs: Vec<_> = (0..10).map(|_| Rig::start(&world, pair("p1"))).collect();
    let tokens = join_all(rigs.iter().map(|rig| rig.tokens.wait(MINUTE))).await;
    let first = tokens[0].as_ref().unwrap().authorization.clone();
    assert!(tokens.iter().all(|token| token.as_ref().unwrap().authorization == first));
    assert_eq!(world.mint_times().len(), 1);
}

/// C10, C29: killed a hundred times, one mint; killed a hundred times while minting, no more than the budget.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c10_a_crash_loop_reuses_the_stored_token() {
    let world = World::new();
    world.persist();
    for round in 0..100 {
        let rig = Rig::start(&world, pair("p1"));
        let token = rig.tokens.wait(WAIT).await.unwrap();
        assert_eq!((token.generation, rig.status().source), (1, if round == 0 { "minted" } else { "store" }));
        rig.task.abort();
    }
    assert_eq!(world.mint_times().len(), 1);

    let world = World::new();
    world.persist();
    world.mint_takes(HOUR);
    for _ in 0..100 {
        let rig = Rig::start(&world, pair("p1"));
        sleep(5 * SECOND).await;
        rig.task.abort();
    }
    assert!((2..=6).contains(&world.mint_times().len()), "{:?}", world.mint_times());
}

/// C30: a stored token of other credentials is asked about once and forgotten.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c30_a_foreign_stored_token_is_never_sent_with_a_request() {
    let world = World::new();
    world.persist();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    rig.task.abort();
    sleep(2 * MINUTE).await;
    world.forget_deeds();
    let rig = Rig::start(&world, pair("p2"));
    let token = rig.tokens.wait(WAIT).await.unwrap();
    assert_eq!(world.deeds(), [Deed::Probe("garbage"), Deed::Mint(1)]);
    assert_eq!(token.authorization, authorization("t2"));
}

/// C29: a store that does not work costs the cache, not the service.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c29_a_broken_store_does_not_stop_the_service() {
    let world = World::new();
    world.persist();
    world.break_store(&EVERYTHING);
    let rig = Rig::start(&world, pair("p1"));
    assert_eq!(rig.tokens.wait(WAIT).await.unwrap().generation, 1);
    sleep(2 * MINUTE).await;
    world.kill("t1");
    let token = rig.tokens.current().unwrap();
    assert_eq!(generation(&rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await), Some(2));
}

/// C26: an attempt that lies in the future, since the clock was set back, counts as just made, and not for as long as the clock takes to come by.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c26_a_clock_set_back_does_not_hold_mints_back_for_years() {
    let world = World::new();
    world.persist();
    world.store("p1", Contents { token: None, attempts: vec![world.today() + 90_000 * HOUR] });
    let rig = Rig::start(&world, pair("p1"));
    sleep(50 * SECOND).await;
    assert!(rig.tokens.current().is_none() && world.mint_times().is_empty(), "min_mint_interval");
    sleep(15 * SECOND).await;
    assert!(rig.tokens.current().is_some());
}

/// C29: what could not be written counts all the same, and is written with the next attempt.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c29_attempts_are_not_forgotten_while_the_disk_is_full() {
    let world = World::new();
    world.persist();
    world.break_store(&EVERYTHING);
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    rig.control.refresh().await.unwrap();
    sleep(SECOND).await;
    world.break_store(&[]);
    rig.control.refresh().await.unwrap();
    sleep(SECOND).await;
    let other = Rig::start(&world, pair("p1"));
    let _ = other.tokens.wait(WAIT).await.unwrap();
    assert_eq!((rig.status().mints_left, other.status().mints_left), (3, 3));
}

/// C29: what could not be read is not written over, for it holds what other processes did. The attempt is written with the next one.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c29_a_store_that_cannot_be_read_is_not_written_over() {
    let world = World::new();
    world.persist();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    rig.control.refresh().await.unwrap();
    sleep(SECOND).await;
    let other = Rig::start(&world, pair("p1"));
    let _ = other.tokens.wait(WAIT).await.unwrap();
    world.break_store(&[Operation::Read]);
    other.control.refresh().await.unwrap();
    sleep(SECOND).await;
    assert_eq!(other.tokens.current().unwrap().authorization, authorization("t3"));
    world.break_store(&[]);
    let third = Rig::start(&world, pair("p1"));
    assert_eq!(third.tokens.wait(WAIT).await.unwrap().authorization, authorization("t2"));
    assert_eq!(third.status().mints_left, 4);

    other.control.refresh().await.unwrap();
    sleep(SECOND).await;
    let fourth = Rig::start(&world, pair("p1"));
    assert_eq!(fourth.tokens.wait(WAIT).await.unwrap().authorization, authorization("t4"));
    assert_eq!(fourth.status().mints_left, 2);
}

/// C29: the older token that a full disk leaves in the store is not another process's successor of the one that could not be saved.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c29_an_unsaved_token_does_not_give_way_to_the_stored_one() {
    let world = World::new();
    world.persist();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    rig.task.abort();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    world.break_store(&[Operation::Write]);
    world.forget_deeds();
    for dead in ["t1", "t2"] {
        sleep(2 * MINUTE).await;
        world.kill(dead);
        let token = rig.tokens.current().unwrap();
        assert_eq!(token.authorization, authorization(dead));
        let _ = rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await;
    }
    assert_eq!(world.deeds(), [Deed::Probe("t1"), Deed::Mint(1), Deed::Probe("t2"), Deed::Mint(2)]);
}

/// C29: attempts that could not be written are written later with the time at which they were made, however long the disk takes.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c29_late_attempts_keep_their_time_on_a_slow_disk() {
    let world = World::new();
    world.persist();
    world.break_store(&EVERYTHING);
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    let attempted = world.today();
    sleep(MINUTE).await;
    world.break_store(&[]);
    // What lies in the future is moved first, with a save of its own.
    world.store("p1", Contents { token: None, attempts: vec![world.today() + HOUR] });
    world.save_takes(5 * SECOND);
    rig.control.refresh().await.unwrap();
    sleep(MINUTE).await;
    assert_eq!(world.stored_attempts().first(), Some(&attempted));
    assert_eq!(world.stored_attempts().len(), 3);
}

/// C31: the first mint with new credentials need not wait for the interval; it is the first one of all processes together.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c31_one_process_has_the_first_mint_with_new_credentials() {
    let world = World::new();
    world.persist();
    let rigs = [Rig::start(&world, pair("p1")), Rig::start(&world, pair("p1"))];
    sleep(HOUR).await;
    world.mints_are(Mint::Lost);
    for rig in &rigs {
        rig.credentials.send_replace(pair("p2"));
    }
    sleep(10 * SECOND).await;
    // Nor does an operator's attempt, which leaves no token, make the other process the first one.
    world.mints_are(Mint::Retry("connection refused", None));
    join_all(rigs.iter().map(|rig| rig.control.refresh())).await;
    sleep(SECOND).await;
    world.mints_are(Mint::Lost);
    world.forget_deeds();
    sleep(39 * SECOND).await;
    assert_eq!(world.mint_times().len(), 0, "one of them tried");
    sleep(20 * SECOND).await;
    assert_eq!(world.mint_times().len(), 1);
}

/// C10: processes that start again and again beside a dead token keep the pause between mints.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c10_a_crash_loop_beside_a_dead_token_pauses() {
    let world = World::new();
    world.persist();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    rig.task.abort();
    sleep(HOUR).await;
    world.kill("t1");
    world.mint_takes(HOUR);
    for _ in 0..11 {
        let rig = Rig::start(&world, pair("p1"));
        sleep(5 * SECOND).await;
        rig.task.abort();
    }
    assert_eq!(world.mint_times().len(), 2, "{:?}", world.mint_times());
}

/// C31: a token that looked foreign with the old credentials works with the new ones, which another process had first: no mint is needed.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c31_a_stored_token_is_looked_at_again_with_other_credentials() {
    let world = World::new();
    world.persist();
    let first = Rig::start(&world, pair("p2"));
    let _ = first.tokens.wait(WAIT).await.unwrap();
    sleep(HOUR).await;
    world.mints_are(Mint::Retry("connection refused", None));
    let late = Rig::start(&world, pair("p1"));
    assert!(late.tokens.wait(WAIT).await.is_err());
    world.mints_are(Mint::Succeeds);
    late.credentials.send_replace(pair("p2"));
    assert_eq!(late.tokens.wait(WAIT).await.unwrap().authorization, authorization("t1"));
}

/// C37: credentials that were replaced while an attempt waited for the lock mint nothing.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c37_replaced_credentials_do_not_mint() {
    let world = World::new();
    world.persist();
    let rig = Rig::start(&world, pair("p1"));
    let _ = rig.tokens.wait(WAIT).await.unwrap();
    let held = world.lock();
    rig.credentials.send_replace(pair("p2"));
    sleep(SECOND).await;
    rig.credentials.send_replace(pair("p3"));
    sleep(SECOND).await;
    drop(held);
    sleep(SECOND).await;
    assert_eq!(world.deeds(), [Deed::Mint(0), Deed::Mint(1)]);
}

// ---- lost replies, faults, stop ----

/// C11: counted, paced by the interval, and seen.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c11_a_lost_reply_is_counted() {
    let world = World::new();
    world.mints_are(Mint::Lost);
    let rig = Rig::start(&world, pair("p1"));
    sleep(MINUTE * 2 + SECOND).await;
    assert_eq!((world.mint_times().len(), rig.status().mints_left), (3, 3));
    assert_eq!(rig.status().last_mint.unwrap().0, "lost");
    sleep(30 * MINUTE).await;
    assert_eq!((world.mint_times().len(), rig.status().mints_left), (6, 0));
}

/// The interval alone would not tell what to mend.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c11_the_status_tells_why_there_is_no_token_beside_what_is_waited_for() {
    let world = World::new();
    world.mints_are(Mint::Lost);
    let rig = Rig::start(&world, pair("p1"));
    sleep(SECOND).await;
    let reason = rig.status().reasons[0].clone();
    assert!(reason.starts_with("no token yet: connection reset; token.min_mint_interval is not over; next mint at "), "{reason}");
    sleep(30 * MINUTE).await;
    let reason = rig.status().reasons[0].clone();
    assert!(reason.starts_with("no token yet: connection reset; token.mint_budget (6 per hour) is spent; next mint at "), "{reason}");
}

/// C08: a panic on the way to a token leaves nobody waiting for ever.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c08_a_panic_in_the_mint_is_survived() {
    let world = World::new();
    world.mints_are(Mint::Panics);
    let rig = Rig::start(&world, pair("p1"));
    assert!(rig.tokens.wait(WAIT).await.is_err());
    assert_eq!((rig.status().last_mint.unwrap().0, rig.status().mints_left), ("lost", 5));
    world.mints_are(Mint::Succeeds);
    sleep(MINUTE).await;
    assert!(rig.tokens.current().is_some());
}

/// C43: a mint in flight gets 2 s at a stop; its token is revoked where no store keeps it.
#[tokio::test(flavor = "local", start_paused = true)]
async fn c43_a_mint_in_flight_is_finished_at_a_stop() {
    for (mint_takes, deeds) in [(SECOND, vec![Deed::Mint(0), Deed::Revoke("t1", "t1")]), (10 * SECOND, vec![Deed::Mint(0)])] {
        let world = World::new();
        world.allow_revocation();
        world.mint_takes(mint_takes);
        let rig = Rig::start(&world, pair("p1"));
        settle().await;
        let started = Instant::now();
        rig.control.shutdown().await;
        within(rig.task).await.unwrap();
        assert!(started.elapsed() <= 2 * SECOND, "{:?}", started.elapsed());
        assert_eq!(world.deeds(), deeds);
        let reader: &TokenReader = &rig.tokens;
        let _ = within(reader.wait(WAIT)).await;
        assert!(started.elapsed() <= 2 * SECOND, "nobody waits for a task that has ended");
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn superseded_tokens_are_revoked_after_a_while_and_a_store_keeps_its_own() {
    for (persists, expected) in [
        (false, vec![Deed::Mint(0), Deed::Mint(1), Deed::Revoke("t1", "t2"), Deed::Revoke("t2", "t2")]),
        (true, vec![Deed::Mint(0), Deed::Mint(1), Deed::Revoke("t1", "t2")]),
    ] {
        let world = World::new();
        world.allow_revocation();
        if persists {
            world.persist();
        }
        let rig = Rig::start(&world, pair("p1"));
        let _ = rig.tokens.wait(WAIT).await.unwrap();
        rig.control.refresh().await.unwrap();
        sleep(5 * SECOND).await;
        assert_eq!(world.deeds().len(), 2, "requests may still be on their way with it");
        sleep(2 * SECOND).await;
        assert_eq!(world.deeds().len(), 3);
        rig.control.shutdown().await;
        within(rig.task).await.unwrap();
        assert_eq!(world.deeds(), expected);
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn the_task_ends_when_nobody_is_left() {
    let world = World::new();
    let rig = Rig::start(&world, pair("p1"));
    let (Rig { tokens, control, task, .. }, limit) = (rig, WAIT);
    let _ = tokens.wait(limit).await.unwrap();
    drop((tokens, control));
    within(task).await.unwrap();
}

/// B37: no secret in what operators see.
#[tokio::test(flavor = "local", start_paused = true)]
async fn b37_the_status_holds_no_secret() {
    let world = World::new();
    let rig = Rig::start(&world, pair("canary-password"));
    let token: ActiveToken = rig.tokens.wait(WAIT).await.unwrap();
    world.kill("t1");
    let _ = rig.tokens.reject(&token, FORBIDDEN, true, WAIT).await;
    let shown = format!("{:?} {token:?} {:?} {:?}", rig.status(), rig.tokens, rig.control);
    assert!(!shown.contains("secret-of-") && !shown.contains("canary-password@"), "{shown}");
}
