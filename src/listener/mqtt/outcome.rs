//! What the gateway decided, as MQTT says it: the table of the wire contract, one function per packet.

use std::time::Duration;

use tidegate_mqtt::{Qos as WireQos, Reason};

use crate::gateway::Mqtt311Refused;
use crate::message::{CloseReason, Qos, Receipt, Reject};

/// What becomes of a PUBLISH that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// MQTT 5: PUBACK or PUBREC with this reason. At QoS 0 nobody is told.
    Answer(Reason),
    /// 3.1.1, which has no refusal: the answer is withheld, nothing is read for this long, then the message is tried again.
    Hold(Duration),
    /// The connection ends.
    Close(Reason),
    /// The connection is about to end by itself; the client will send the message again.
    Silence,
}

/// Answer to an accepted PUBLISH.
pub fn accepted(receipt: Receipt) -> Reason {
    if receipt.receivers == 0 { Reason::NoMatchingSubscribers } else { Reason::Success }
}

/// Answer to a refused PUBLISH of a MQTT 5 client.
///
/// PUBACK has no 0x95 ([MQTT-3.4.2-1] gives the list), so a message over a rule's size is over a quota there; the reason string names the limit.
pub fn refused_v5(reject: &Reject) -> Refused {
    match reject {
        Reject::Unauthenticated => Refused::Close(Reason::NotAuthorized),
        Reject::Forbidden { .. } => Refused::Answer(Reason::NotAuthorized),
        Reject::TooFast { .. } | Reject::Full { .. } | Reject::TooLarge { .. } => {
            Refused::Answer(Reason::QuotaExceeded)
        }
        // What the gateway finds malformed in a decoded packet is its topic.
        Reject::Malformed { .. } => Refused::Answer(Reason::TopicNameInvalid),
        Reject::NotFound => Refused::Answer(Reason::UnspecifiedError),
        Reject::ShuttingDown => Refused::Silence,
    }
}

/// What a 3.1.1 client is made to feel instead.
pub fn refused_v311(reject: &Reject, wish: Mqtt311Refused) -> Refused {
    let closed = |reason| match wish {
        Mqtt311Refused::Close => Refused::Close(reason),
        // Its PUBACK carries no reason.
        Mqtt311Refused::Drop => Refused::Answer(reason),
    };
    match reject {
        Reject::TooFast { retry_after, .. } | Reject::Full { retry_after, .. } => {
            Refused::Hold((*retry_after).clamp(HOLD_MIN, HOLD_MAX))
        }
        Reject::ShuttingDown => Refused::Silence,
        Reject::Unauthenticated => Refused::Close(Reason::NotAuthorized),
        Reject::Forbidden { .. } => closed(Reason::NotAuthorized),
        Reject::TooLarge { .. } => closed(Reason::PacketTooLarge),
        Reject::Malformed { .. } => closed(Reason::TopicNameInvalid),
        Reject::NotFound => closed(Reason::UnspecifiedError),
    }
}

/// CONNACK for a refused CONNECT. 3.1.1 has its own codes, which the engine puts in place of these.
pub fn connack(reject: &Reject) -> Reason {
    match reject {
        Reject::Unauthenticated | Reject::Forbidden { .. } => Reason::NotAuthorized,
        Reject::TooFast { .. } => Reason::ConnectionRateExceeded,
        Reject::TooLarge { .. } => Reason::PacketTooLarge,
        Reject::Full { .. } => Reason::QuotaExceeded,
        // Authentication data that is not of the method's form: as good as wrong, and a stranger learns no more.
        Reject::Malformed { .. } => Reason::NotAuthorized,
        Reject::NotFound => Reason::UnspecifiedError,
        // CONNACK has no 0x8B.
        Reject::ShuttingDown => Reason::ServerUnavailable,
    }
}

/// SUBACK for one filter; the engine makes 0x80 of every refusal for 3.1.1.
pub fn suback(reject: &Reject) -> Reason {
    match reject {
        Reject::Unauthenticated | Reject::Forbidden { .. } => Reason::NotAuthorized,
        Reject::TooFast { .. } | Reject::Full { .. } | Reject::TooLarge { .. } => Reason::QuotaExceeded,
        Reject::Malformed { .. } => Reason::TopicFilterInvalid,
        Reject::NotFound | Reject::ShuttingDown => Reason::UnspecifiedError,
    }
}

/// SUBACK for a granted filter.
pub fn granted(qos: Qos) -> Reason {
    match qos {
        Qos::AtMostOnce => Reason::Success,
        Qos::AtLeastOnce => Reason::GrantedQos1,
        Qos::ExactlyOnce => Reason::GrantedQos2,
    }
}

/// DISCONNECT for a session that the gateway ends.
pub fn disconnect(reason: CloseReason) -> Reason {
    match reason {
        CloseReason::TakenOver => Reason::SessionTakenOver,
        CloseReason::NotAuthorized => Reason::NotAuthorized,
        CloseReason::TooSlow => Reason::QuotaExceeded,
        CloseReason::ShuttingDown => Reason::ServerShuttingDown,
        CloseReason::Administrative => Reason::AdministrativeAction,
    }
}

pub fn from_wire(qos: WireQos) -> Qos {
    match qos {
        WireQos::AtMostOnce => Qos::AtMostOnce,
        WireQos::AtLeastOnce => Qos::AtLeastOnce,
        WireQos::ExactlyOnce => Qos::ExactlyOnce,
    }
}

pub fn to_wire(qos: Qos) -> WireQos {
    match qos {
        Qos::AtMostOnce => WireQos::AtMostOnce,
        Qos::AtLeastOnce => WireQos::AtLeastOnce,
        Qos::ExactlyOnce => WireQos::ExactlyOnce,
    }
}

/// A withheld message is tried again no sooner and no later than this.
const HOLD_MIN: Duration = Duration::from_millis(10);
const HOLD_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_client_that_is_refused_is_closed_or_humoured_and_waits_where_waiting_helps() {
        let forbidden = Reject::Forbidden { rule: None };
        assert_eq!(refused_v311(&forbidden, Mqtt311Refused::Close), Refused::Close(Reason::NotAuthorized));
        assert_eq!(refused_v311(&forbidden, Mqtt311Refused::Drop), Refused::Answer(Reason::NotAuthorized));
        let full = Reject::Full { limit: "spool", retry_after: Duration::from_secs(1) };
        for wish in [Mqtt311Refused::Close, Mqtt311Refused::Drop] {
            assert_eq!(refused_v311(&full, wish), Refused::Hold(Duration::from_secs(1)));
            assert_eq!(refused_v311(&Reject::Unauthenticated, wish), Refused::Close(Reason::NotAuthorized));
        }
    }
}
