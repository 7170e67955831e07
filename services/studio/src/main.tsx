import { render } from "preact";
import { applyTheme } from "./shell/theme";
import { Studio } from "./shell/Studio";
import "./style/base.css";
import "./style/controls.css";
import "./style/parts.css";
import "./style/tokens.css";
import "./style/rooms.css";

applyTheme();
render(<Studio />, document.body);
