//! Reason codes of MQTT 5 (section 2.4) and their MQTT 3.1.1 equivalents.

use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// Why something succeeded or failed. Below 0x80 is success.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name = $code,)* }

        impl Reason {
            /// Every code of the specification, in order.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// None for a code that the specification does not have.
            pub const fn from_u8(code: u8) -> Option<Self> {
                match code { $($code => Some(Reason::$name),)* _ => None }
            }

            /// The specification's name in lowercase, for logs and reason strings.
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// Also Normal disconnection and Granted QoS 0.
    Success = 0x00, "success";
    GrantedQos1 = 0x01, "granted QoS 1";
    GrantedQos2 = 0x02, "granted QoS 2";
    DisconnectWithWill = 0x04, "disconnect with will message";
    NoMatchingSubscribers = 0x10, "no matching subscribers";
    NoSubscriptionExisted = 0x11, "no subscription existed";
    ContinueAuthentication = 0x18, "continue authentication";
    ReAuthenticate = 0x19, "re-authenticate";
    UnspecifiedError = 0x80, "unspecified error";
    MalformedPacket = 0x81, "malformed packet";
    ProtocolError = 0x82, "protocol error";
    ImplementationSpecificError = 0x83, "implementation specific error";
    UnsupportedProtocolVersion = 0x84, "unsupported protocol version";
    ClientIdentifierNotValid = 0x85, "client identifier not valid";
    BadUserNameOrPassword = 0x86, "bad user name or password";
    NotAuthorized = 0x87, "not authorized";
    ServerUnavailable = 0x88, "server unavailable";
    ServerBusy = 0x89, "server busy";
    Banned = 0x8A, "banned";
    ServerShuttingDown = 0x8B, "server shutting down";
    BadAuthenticationMethod = 0x8C, "bad authentication method";
    KeepAliveTimeout = 0x8D, "keep alive timeout";
    SessionTakenOver = 0x8E, "session taken over";
    TopicFilterInvalid = 0x8F, "topic filter invalid";
    TopicNameInvalid = 0x90, "topic name invalid";
    PacketIdentifierInUse = 0x91, "packet identifier in use";
    PacketIdentifierNotFound = 0x92, "packet identifier not found";
    ReceiveMaximumExceeded = 0x93, "receive maximum exceeded";
    TopicAliasInvalid = 0x94, "topic alias invalid";
    PacketTooLarge = 0x95, "packet too large";
    MessageRateTooHigh = 0x96, "message rate too high";
    QuotaExceeded = 0x97, "quota exceeded";
    AdministrativeAction = 0x98, "administrative action";
    PayloadFormatInvalid = 0x99, "payload format invalid";
    RetainNotSupported = 0x9A, "retain not supported";
    QosNotSupported = 0x9B, "QoS not supported";
    UseAnotherServer = 0x9C, "use another server";
    ServerMoved = 0x9D, "server moved";
    SharedSubscriptionsNotSupported = 0x9E, "shared subscriptions not supported";
    ConnectionRateExceeded = 0x9F, "connection rate exceeded";
    MaximumConnectTime = 0xA0, "maximum connect time";
    SubscriptionIdentifiersNotSupported = 0xA1, "subscription identifiers not supported";
    WildcardSubscriptionsNotSupported = 0xA2, "wildcard subscriptions not supported";
}

impl Reason {
    pub const fn is_error(self) -> bool {
        self as u8 >= 0x80
    }

    /// The MQTT 3.1.1 CONNACK return code (section 3.2.2.3) that says the same.
    pub const fn connack_311(self) -> u8 {
        match self {
            Reason::Success => 0,
            Reason::UnsupportedProtocolVersion => 1,
            Reason::ClientIdentifierNotValid => 2,
            Reason::ServerUnavailable
            | Reason::ServerBusy
            | Reason::ServerShuttingDown
            | Reason::QuotaExceeded
            | Reason::ConnectionRateExceeded
            | Reason::UseAnotherServer
            | Reason::ServerMoved => 3,
            Reason::BadUserNameOrPassword => 4,
            _ => 5,
        }
    }

    /// The reason a MQTT 3.1.1 CONNACK return code stands for; None above 5 (reserved).
    pub const fn from_connack_311(code: u8) -> Option<Self> {
        match code {
            0 => Some(Reason::Success),
            1 => Some(Reason::UnsupportedProtocolVersion),
            2 => Some(Reason::ClientIdentifierNotValid),
            3 => Some(Reason::ServerUnavailable),
            4 => Some(Reason::BadUserNameOrPassword),
            5 => Some(Reason::NotAuthorized),
            _ => None,
        }
    }

    pub(crate) const fn in_connack(self) -> bool {
        use Reason::*;
        matches!(
            self,
            Success
                | UnspecifiedError
                | MalformedPacket
                | ProtocolError
                | ImplementationSpecificError
                | UnsupportedProtocolVersion
                | ClientIdentifierNotValid
                | BadUserNameOrPassword
                | NotAuthorized
                | ServerUnavailable
                | ServerBusy
                | Banned
                | BadAuthenticationMethod
                | TopicNameInvalid
                | PacketTooLarge
                | QuotaExceeded
                | PayloadFormatInvalid
                | RetainNotSupported
                | QosNotSupported
                | UseAnotherServer
                | ServerMoved
                | ConnectionRateExceeded
        )
    }

    /// PUBACK and PUBREC share one table (sections 3.4.2.1 and 3.5.2.1).
    pub(crate) const fn in_puback(self) -> bool {
        use Reason::*;
        matches!(
            self,
            Success
                | NoMatchingSubscribers
                | UnspecifiedError
                | ImplementationSpecificError
                | NotAuthorized
                | TopicNameInvalid
                | PacketIdentifierInUse
                | QuotaExceeded
                | PayloadFormatInvalid
        )
    }

    /// PUBREL and PUBCOMP share one table (sections 3.6.2.1 and 3.7.2.1).
    pub(crate) const fn in_pubrel(self) -> bool {
        matches!(self, Reason::Success | Reason::PacketIdentifierNotFound)
    }

    pub(crate) const fn in_suback(self) -> bool {
        use Reason::*;
        matches!(
            self,
            Success
                | GrantedQos1
                | GrantedQos2
                | UnspecifiedError
                | ImplementationSpecificError
                | NotAuthorized
                | TopicFilterInvalid
                | PacketIdentifierInUse
                | QuotaExceeded
                | SharedSubscriptionsNotSupported
                | SubscriptionIdentifiersNotSupported
                | WildcardSubscriptionsNotSupported
        )
    }

    pub(crate) const fn in_unsuback(self) -> bool {
        use Reason::*;
        matches!(
            self,
            Success
                | NoSubscriptionExisted
                | UnspecifiedError
                | ImplementationSpecificError
                | NotAuthorized
                | TopicFilterInvalid
                | PacketIdentifierInUse
        )
    }

    pub(crate) const fn in_disconnect(self) -> bool {
        use Reason::*;
        !matches!(
            self,
            GrantedQos1
                | GrantedQos2
                | NoMatchingSubscribers
                | NoSubscriptionExisted
                | ContinueAuthentication
                | ReAuthenticate
                | UnsupportedProtocolVersion
                | ClientIdentifierNotValid
                | BadUserNameOrPassword
                | ServerUnavailable
                | Banned
                | BadAuthenticationMethod
                | PacketIdentifierInUse
                | PacketIdentifierNotFound
        )
    }

    pub(crate) const fn in_auth(self) -> bool {
        matches!(self, Reason::Success | Reason::ContinueAuthentication | Reason::ReAuthenticate)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_reads_back_and_errors_start_at_0x80() {
        let known: Vec<u8> = (0..=255).filter(|c| Reason::from_u8(*c).is_some()).collect();
        assert_eq!(known, Reason::ALL.iter().map(|r| *r as u8).collect::<Vec<_>>());
        for reason in Reason::ALL {
            assert_eq!(reason.is_error(), *reason as u8 >= 0x80);
        }
    }

    #[test]
    fn every_311_return_code_maps_there_and_back() {
        for code in 0..=5 {
            assert_eq!(Reason::from_connack_311(code).map(Reason::connack_311), Some(code));
        }
        assert_eq!(Reason::from_connack_311(6), None);
    }
}
