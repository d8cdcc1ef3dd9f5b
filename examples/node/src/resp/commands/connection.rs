//! Commands about the connection itself.

use std::sync::Arc;

use bytes::Bytes;

use super::{Action, Arguments, Context, OK, Parsed, Reply, Session, Version};
use super::{integer, unknown_subcommand, word, wrong_arity};

pub(super) fn ping(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    match arguments.len() {
        1 => Ok(Action::Reply(Reply::Simple("PONG"))),
        2 => Ok(Action::Reply(Reply::Bulk(arguments[1].clone()))),
        _ => Err(wrong_arity("ping")),
    }
}

pub(super) fn echo(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(Action::Reply(Reply::Bulk(arguments[1].clone())))
}

pub(super) fn quit(_: &Arc<Context>, _: &mut Session, _: Arguments) -> Parsed {
    Ok(Action::Close(OK))
}

pub(super) fn select(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    match integer(&arguments[1])? {
        0 => Ok(Action::Reply(OK)),
        _ => Err(Reply::error("ERR SELECT is not allowed in cluster mode")),
    }
}

/// READONLY, READWRITE and ASKING: there are no replicas, and no slot is ever half here.
pub(super) fn accepted(_: &Arc<Context>, _: &mut Session, _: Arguments) -> Parsed {
    Ok(Action::Reply(OK))
}

pub(super) fn reset(_: &Arc<Context>, session: &mut Session, _: Arguments) -> Parsed {
    session.name = Bytes::new();
    session.version = Version::Resp2;
    Ok(Action::Reply(Reply::Simple("RESET")))
}

pub(super) fn hello(_: &Arc<Context>, session: &mut Session, arguments: Arguments) -> Parsed {
    let mut version = session.version;
    let mut name = None;
    if let Some(wanted) = arguments.get(1) {
        version = match super::parse_integer(wanted) {
            Some(2) => Version::Resp2,
            Some(3) => Version::Resp3,
            Some(_) => return Err(Reply::error("NOPROTO unsupported protocol version")),
            None => return Err(Reply::error("ERR Protocol version is not an integer or out of range")),
        };
        let mut options = arguments[2..].iter();
        while let Some(option) = options.next() {
            match (word(option).as_slice(), options.next()) {
                (b"SETNAME", Some(given)) => name = Some(checked_name(given)?),
                (b"AUTH", Some(_)) if options.next().is_some() => {
                    return Err(Reply::error(
                        "ERR AUTH <password> called without any password configured for the default user. \
                         Are you sure your configuration is correct?",
                    ));
                }
                _ => {
                    let shown = String::from_utf8_lossy(&option[..option.len().min(128)]);
                    return Err(Reply::error(format!("ERR Syntax error in HELLO option '{shown}'")));
                }
            }
        }
    }
    session.version = version;
    if let Some(name) = name {
        session.name = name;
    }
    let pair = |key: &str, value: Reply| (Reply::text(key), value);
    Ok(Action::Reply(Reply::Map(vec![
        pair("server", Reply::text("redis")),
        pair("version", Reply::text(super::server::REDIS_VERSION)),
        pair("proto", Reply::Integer(if version == Version::Resp3 { 3 } else { 2 })),
        pair("id", Reply::integer(session.id)),
        pair("mode", Reply::text("cluster")),
        pair("role", Reply::text("master")),
        pair("modules", Reply::Array(vec![])),
    ])))
}

/// Bytes of a client's name. It is kept for the connection's life.
const MAX_NAME: usize = 1024;

/// A name that is safe to show in lists.
fn checked_name(name: &Bytes) -> Result<Bytes, Reply> {
    if name.len() > MAX_NAME {
        return Err(Reply::error(format!("ERR Client names cannot have more than {MAX_NAME} bytes.")));
    }
    if name.iter().all(|b| (b'!'..=b'~').contains(b)) {
        Ok(Bytes::copy_from_slice(name))
    } else {
        Err(Reply::error("ERR Client names cannot contain spaces, newlines or special characters."))
    }
}

pub(super) fn client(_: &Arc<Context>, session: &mut Session, arguments: Arguments) -> Parsed {
    let subcommand = word(&arguments[1]);
    let exactly = |count: usize, name: &str| {
        if arguments.len() == count { Ok(()) } else { Err(wrong_arity(&format!("client|{name}"))) }
    };
    let reply = match subcommand.as_slice() {
        b"ID" => {
            exactly(2, "id")?;
            Reply::integer(session.id)
        }
        b"GETNAME" => {
            exactly(2, "getname")?;
            if session.name.is_empty() { Reply::Null } else { Reply::Bulk(session.name.clone()) }
        }
        b"SETNAME" => {
            exactly(3, "setname")?;
            session.name = checked_name(&arguments[2])?;
            OK
        }
        b"SETINFO" => {
            exactly(4, "setinfo")?;
            match word(&arguments[2]).as_slice() {
                b"LIB-NAME" | b"LIB-VER" => {
                    checked_name(&arguments[3])?;
                    OK
                }
                _ => {
                    let shown = String::from_utf8_lossy(&arguments[2][..arguments[2].len().min(128)]);
                    return Err(Reply::error(format!("ERR Unrecognized option '{shown}'")));
                }
            }
        }
        b"INFO" => {
            exactly(2, "info")?;
            let name = String::from_utf8_lossy(&session.name);
            let resp = if session.version == Version::Resp3 { 3 } else { 2 };
            Reply::text(format!("id={} name={name} db=0 resp={resp}\n", session.id))
        }
        _ => return Err(unknown_subcommand("client", &arguments[1])),
    };
    Ok(Action::Reply(reply))
}
