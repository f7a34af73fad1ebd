//! Where the guests' DNS proxy listens, and whom it asks.

use far_net::{GATEWAY, Network};
use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

/// A far-node that was killed leaves copies of its sockets in children until their exec: moments.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// The first name server of the blade's own configuration (resolv.conf(5)).
pub(super) fn of_the_blade() -> Option<SocketAddr> {
    first_server(&std::fs::read_to_string("/etc/resolv.conf").ok()?)
}

fn first_server(text: &str) -> Option<SocketAddr> {
    let server = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        address.parse::<IpAddr>().ok()
    })?;
    Some(SocketAddr::new(server, 53))
}

/// Port 53 of the guests' gateway, in their namespace.
pub(super) fn bind(network: &Network) -> io::Result<UdpSocket> {
    let netns = network
        .netns()
        .ok_or_else(|| io::Error::other("no namespace of the guests"))?;
    let give_up = Instant::now() + PATIENCE;
    let socket = loop {
        match netns
            .run_inside(|| UdpSocket::bind((GATEWAY, 53)))
            .map_err(io::Error::other)?
        {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < give_up => {}
            bound => break bound?,
        }
        // The end of a socket's last copy is told nowhere.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(PAUSE);
    };
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_server_that_is_an_address_counts() {
        let cases = [
            ("# none\nsearch example.com\n", None),
            ("nameserver 192.0.2.53\nnameserver 192.0.2.54\n", Some("192.0.2.53:53")),
            (
                "nameserver\nnameserver nonsense\n nameserver 2001:db8::53 # two\n",
                Some("[2001:db8::53]:53"),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(
                first_server(text),
                expected.map(|text| text.parse().unwrap()),
                "{text:?}"
            );
        }
    }
}
