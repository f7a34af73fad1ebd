mod common;
use common::*;
#[test]
fn dbg() {
    let blade = Blade::new(far_net::Options::default());
    let rule = |n: &&str| far_net::Rule { to: far_net::Destination::Cidr(n.parse().unwrap()), protocol: far_net::Protocol::Udp, ports: ECHO..=ECHO };
    let place = blade.network.attach(far_net::Policy{mode: far_net::Mode::Restricted, egress: ["203.0.113.0/24","2a00:fa::/32"].iter().map(rule).collect(), ..Default::default()}).unwrap();
    let mut tap = blade.tap(&place);
    aim(&blade.path(), place.tap.as_str());
    let from = From::place(&place);
    let mut dump = std::process::Command::new("nsenter").arg(format!("--net={}", blade.path().display())).args(["timeout","3","tcpdump","-nei","any","-vv"]).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    tap.send(&from.udp(WORLD, ECHO, "hello"));
    tap.send(&from.udp6(WORLD6, ECHO, "hello"));
    std::thread::sleep(std::time::Duration::from_secs(1));
    println!("{:?}", blade.network.counters(place.slot));
    let t = |a: &[&str]| println!("{}", String::from_utf8_lossy(&run_in(&blade.path(), a).stdout));
    t(&["sh","-c","nft list ruleset; nft -j list ruleset | wc -c"]);
    t(&["ip","route"]); t(&["ip","neigh"]); t(&["ip","-6","route"]); t(&["ip","addr"]);
    t(&["cat","/proc/net/nf_conntrack"]);
    dump.wait().unwrap();
}
