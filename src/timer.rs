//! A timer that is armed early rather than late, and asked again when it fires: what is busy pays a comparison per wait and no
//! timer operation per message.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep};

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct LazyTimer {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl LazyTimer {
    /// Ready once `deadline` has passed. The deadline may differ from call to call.
    pub fn poll_past(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    /// Asks for `first` once and for `last` from then on: the seconds until it is ready.
    async fn seconds(first: u64, last: u64) -> u64 {
        let began = Instant::now();
        let mut timer = LazyTimer::default();
        let mut deadline = first;
        poll_fn(|cx| {
            let ready = timer.poll_past(cx, began + Duration::from_secs(deadline));
            if deadline != last {
                deadline = last;
                cx.waker().wake_by_ref();
            }
            ready
        })
        .await;
        began.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_of_the_last_call_holds() {
        assert_eq!(seconds(20, 20).await, 20);
        assert_eq!(seconds(5, 20).await, 20, "put off");
        assert_eq!(seconds(30, 10).await, 10, "moved up");
    }
}
