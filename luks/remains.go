package luks

// unborn says that the mapping is one of ours and never had a table in force: a
// process was killed between making it and its table. It has served no read and no
// write, and is removed, or the volume would stay shut until the machine starts anew.
func (m liveMapping) unborn(uuid, name string) bool {
	return m.empty && m.open == 0 && m.uuid == dmUUID(uuid, name)
}
